"""The commands that ship a bundle: `check`, `sign`, `pack`, `publish`, `diff`.

In: arguments. Out: see `builder.cli.app`, where they are registered.
"""

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
    Path | None, typer.Option(help="A PEM file: the bundle must be signed by this key's owner.", show_default=False)
]
DIFFERENT = 1  # the exit code of `diff`, as that of diff(1)


def check(bundle: Bundle, key: PublicKey = None, as_json: Json = False) -> None:
    """Check a bundle's files, contract, safety and signature; believes nothing in it, runs nothing of it."""
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
    """Check a bundle and pack it, to the same bytes anywhere; prints SHA-256 and path as sha256sum does."""
    with _shown(as_json):
        from builder.bundle.pack import pack

        done = pack(bundle, output)
        if as_json:
            archives = [{"path": str(one.path), "size": one.size, "sha256": one.sha256} for one in done]
            emit({"ok": True, "bundle": str(bundle), "archives": archives})
            return
        for one in done:
            print(f"{one.sha256}  {one.path}")


def publish(
    bundle: Bundle,
    repo: Annotated[str, typer.Argument(help="A model repository, Org/Name; made where it is not there.")],
    revision: Annotated[str, typer.Option(help="A branch; made where it is not there.")] = "main",
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is a private one.")] = False,
    evidence: Annotated[bool, typer.Option(help="Send evidence/ too; it tells folders of this machine.")] = True,
    prune: Annotated[bool, typer.Option("--prune", help="Remove the repository's other files.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Check a bundle and send it to the hub as one commit; prints the commit's address."""
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
            print(f"{repo} has files besides, so that a download fails `check`: {names}; --prune", file=sys.stderr)
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
    other: Annotated[Path, typer.Argument(help="Another bundle, of the same target or not.", show_default=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables for a pull request.")] = False,
    as_json: Json = False,
) -> None:
    """Say what differs between two bundles: graphs, weights, settings, versions; exits with 1 where anything does."""
    with _shown(as_json):
        from builder.bundle.diff import render
        from builder.bundle.diff.diff import diff

        if markdown and as_json:
            raise typer.BadParameter("give one of them", param_hint="--markdown, --json")
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
    """`reported`, and a bar for every file that takes long where someone looks."""
    with reported(as_json):
        if not sys.stderr.isatty():
            yield
            return
        from builder.cli.progress_bars import bars

        with bars():
            yield


def run(
    bundle: Bundle,
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture to ask about; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where the answer is cut.")] = 256,
    as_json: Json = False,
) -> None:
    """Ask a bundle, greedily; the answer streams to stdout."""
    with reported(as_json):
        from builder.bundle.generate import answer

        said: list[str] = []

        def on_text(text: str) -> None:
            said.append(text)
            if not as_json:
                print(text, end="", flush=True)

        answer(bundle, prompt, image or [], max_new_tokens=max_new_tokens, on_text=on_text)
        if as_json:
            emit({"ok": True, "bundle": str(bundle), "prompt": prompt, "text": "".join(said)})
        else:
            print()
