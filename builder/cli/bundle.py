"""The commands for a finished bundle: `run`, `check`, `sign`, `pack`, `publish`, `diff`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from builder.cli.arguments import Bundle, Json
from builder.cli.exit_codes import emit, reported

PublicKey = Annotated[
    Path | None, typer.Option(help="A PEM file: require a signature by this public key.", show_default=False)
]
DIFFERENT = 1  # the exit code of `diff`, as that of diff(1)


def check(bundle: Bundle, key: PublicKey = None, as_json: Json = False) -> None:
    """Check a bundle's files, graphs, safety and signature, without trusting or running any of it."""
    with _shown(as_json):
        from builder.bundle.check import check

        done = check(bundle, key)
        if as_json:
            emit({"ok": True, **done.as_dict()})
        else:
            from builder.util.console_table import show

            show(*done.renderables())


def sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option(help="A PEM file: an elliptic-curve private key.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Check a bundle, then sign it with a key of your own, offline; prints the signature's path."""
    with _shown(as_json):
        from builder.bundle.check import check
        from builder.bundle.inventory import open_content
        from builder.bundle.sign import sign

        check(bundle)
        path = sign(open_content(bundle), key)
        if as_json:
            emit({"ok": True, "bundle": str(bundle), "signature": str(path)})
        else:
            print(path)


def pack(
    bundle: Bundle,
    output: Annotated[
        Path | None, typer.Option(help="Default: <checkpoint>-<recipe>-<target>.tar, here.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle and pack it into a reproducible .tar; prints SHA-256 and path like sha256sum."""
    with _shown(as_json):
        from builder.bundle.pack import pack

        done = pack(bundle, output)
        if as_json:
            archives = [{"path": str(file.path), "size": file.size, "sha256": file.sha256} for file in done]
            emit({"ok": True, "bundle": str(bundle), "archives": archives})
            return
        for file in done:
            print(f"{file.sha256}  {file.path}")


def publish(
    bundle: Bundle,
    repo: Annotated[str, typer.Argument(help="A model repository, Org/Name; created if absent.")],
    revision: Annotated[str, typer.Option(help="A branch; created if absent.")] = "main",
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    evidence: Annotated[
        bool, typer.Option(help="Upload evidence/ too; it contains folder names of this machine.")
    ] = True,
    prune: Annotated[bool, typer.Option("--prune", help="Delete the repository's other files.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; upload nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Check a bundle and upload it to the hub in one commit; prints the commit's URL."""
    with _shown(as_json):
        from builder.bundle.check import check
        from builder.bundle.inventory import open_content
        from builder.bundle.publish import plan, publish

        check(bundle)
        content = open_content(bundle)
        content = content if evidence else replace(content, evidence=())
        asked = plan(content, repo, revision)
        if asked.others and not prune:
            names = ", ".join(asked.others[:8])
            print(
                f"{repo} has other files, with which a download fails `check`: {names}; --prune deletes them",
                file=sys.stderr,
            )
        address = None if dry_run else publish(content, asked, private=private, prune=prune)
        if as_json:
            emit({"ok": True, "bundle": str(bundle), **asked.as_dict(), "commit": address})
        else:
            from builder.util.console_table import show

            if address is None:
                show(*asked.renderables())
            else:
                print(address)


def diff(
    bundle: Bundle,
    other: Annotated[Path, typer.Argument(help="Another bundle, of any target.", show_default=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two bundles: graphs, weights, settings, versions; exits with 1 if they differ."""
    with _shown(as_json):
        from builder.bundle.diff import render
        from builder.bundle.diff.diff import diff

        if markdown and as_json:
            raise typer.BadParameter("give one of the two", param_hint="--markdown, --json")
        found = diff(bundle, other)
        if as_json:
            emit({"ok": True, **found.as_dict()})
        else:
            from builder.util.console_table import show

            if markdown:
                print(render.markdown(found))
            else:
                show(*render.renderables(found))
        if not found.equal:
            raise typer.Exit(DIFFERENT)


@contextmanager
def _shown(as_json: bool) -> Iterator[None]:
    """`reported`, with a bar for each long step on a terminal."""
    with reported(as_json):
        if not sys.stderr.isatty():
            yield
            return
        from builder.cli.progress_bars import bars

        with bars():
            yield


def run(
    bundle: Bundle,
    prompt: Annotated[str, typer.Option(help="The text of the prompt.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image of the prompt; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 256,
    as_json: Json = False,
) -> None:
    """Generate an answer with a bundle, greedily; it streams to stdout."""
    with reported(as_json):
        from builder.bundle.generate import answer

        pieces: list[str] = []

        def on_text(text: str) -> None:
            pieces.append(text)
            if not as_json:
                print(text, end="", flush=True)

        answer(bundle, prompt, image or [], max_new_tokens=max_new_tokens, on_text=on_text)
        if as_json:
            emit({"ok": True, "bundle": str(bundle), "prompt": prompt, "text": "".join(pieces)})
        else:
            print()
