"""The errors that a user can cause, each with an exit code of its own.

Only `builder/cli/app.py` exits; everything else raises one of these.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

QUOTED = 2000  # characters


class BuildError(Exception):
    """What happened, what was expected, what was found, and what to do next.

    Args:
        what: one sentence that names the file, tensor, key or graph.
        expected: what would have been right.
        found: what is there instead.
        next: the command or edit that resolves it; the class's `default_next` if None.

    Example:
        >>> raise CheckpointError("config.json: unknown dtype", expected="float16", found="int8")
    """

    exit_code = 1
    default_next: str | None = None

    def __init__(self, what: str, *, expected: Any = None, found: Any = None, next: str | None = None) -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found
        self.next = self.default_next if next is None else next

    def __str__(self) -> str:
        lines = [shortened(self.what)]
        lines += [f"  expected: {shortened(self.expected)}"] if self.expected is not None else []
        lines += [f"  found:    {shortened(self.found)}"] if self.found is not None else []
        lines += [f"  next:     {self.next}"] if self.next is not None else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the error as `--json` prints it; `expected`, `found` and `next` are strings or None."""
        text = {key: getattr(self, key) for key in ("expected", "found", "next")}
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": shortened(self.what),
            **{key: None if value is None else shortened(value) for key, value in text.items()},
        }


def shortened(value: Any) -> str:
    """Return `value` as text, with the middle cut out of more than `QUOTED` characters.

    A file can hold names of any length, and integers with more digits than Python converts.
    """
    try:
        text = str(value)
    except ValueError:
        text = f"a number of more than {sys.get_int_max_str_digits()} digits"
    return text if len(text) <= QUOTED else f"{text[: QUOTED // 2]} … {text[-QUOTED // 2 :]}"


class CheckpointError(BuildError):
    """A folder that is not a checkpoint, or a file that is missing, truncated, or contradicts the config."""

    exit_code = 10
    default_next = "fetch the checkpoint again, or save it again with `save_pretrained`"


class UnsupportedError(BuildError):
    """A complete checkpoint of a kind that cannot be exported."""

    exit_code = 11
    default_next = "see README, «Build a checkpoint», for what can be exported"


class UnsafeError(BuildError):
    """Pickle weights, required remote code, or a path that leaves its folder."""

    exit_code = 12
    default_next = "save the checkpoint again with `save_pretrained`, which writes safetensors and no code"


class RecipeError(BuildError):
    """An unknown key, a wrong type, or a combination that no target can run."""

    exit_code = 13
    default_next = "edit the recipe; README, «Build a checkpoint», lists its keys"


class DownloadError(BuildError):
    """The hub could not be reached, or does not have the requested repository, revision or file."""

    exit_code = 14
    default_next = "run the same command again"


class PatchError(BuildError):
    """Upstream source that no patch was verified on, or a patch that never ran."""

    exit_code = 15
    default_next = "`qwen3vl-onnx patches` shows every patch and its state"


class WeightError(BuildError):
    """A graph initializer without a checkpoint tensor, or a tensor that no graph uses."""

    exit_code = 16
    default_next = "save the checkpoint again with `save_pretrained`; if it is right, see `qwen3vl-onnx patches`"


class PassError(BuildError):
    """A graph pass that the recipe requires and that matched nowhere."""

    exit_code = 17
    default_next = "`qwen3vl-onnx patches`: an upstream change alters what is traced"


class ImageError(BuildError):
    """A file that is not an image, or an image that the model cannot take."""

    exit_code = 18
    default_next = "give another file: PNG, JPEG, WebP …"


class OutputError(BuildError):
    """An output folder that holds something else, is in use, or cannot be written."""

    exit_code = 19
    default_next = "give another --output"


class VerificationError(BuildError):
    """A gate that fails."""

    exit_code = 20
    default_next = "read the report in `evidence/`"


class BundleError(BuildError):
    """A folder that is not a bundle, or whose files differ from its manifest."""

    exit_code = 21
    default_next = "build it again with `qwen3vl-onnx build`"


class MissingPackageError(BuildError):
    """A package that this command needs and that is not installed."""

    exit_code = 22
    default_next = 'pip install "qwen3vl-onnx[build]"'


class PromptError(BuildError):
    """A prompt that the model or the runtime cannot take."""

    exit_code = 23
    default_next = "shorten or change the prompt; a chat template must have the form of Qwen3-VL's"


class CasesError(BuildError):
    """A case file that cannot be read, or that requests something that cannot be compared."""

    exit_code = 25
    default_next = "edit the file; builder/reference/case_file.py documents its keys"


class GoldenError(BuildError):
    """A golden file that cannot be read, or that was recorded from something else."""

    exit_code = 26
    default_next = "record it again: qwen3vl-onnx golden CHECKPOINT --output FILE"


class SignatureError(BuildError):
    """A bundle that is not signed, or not with that key; a key that cannot be read."""

    exit_code = 27
    default_next = "get the bundle again from where it was built, and the key from whoever signed it"


class UploadError(BuildError):
    """The hub could not be reached, or rejected the upload."""

    exit_code = 28
    default_next = "run the same command again; files that were uploaded are not sent again"


class ResourceError(BuildError):
    """A build that needs more disk or memory than is available.

    Args:
        estimate: the requirements, as `build --dry-run --json` reports them (see `builder.stages.engine.dry_run`).
    """

    exit_code = 24
    default_next = "`build --dry-run` shows what is needed: give another --output, or a machine with more memory"

    def __init__(
        self,
        what: str,
        *,
        expected: Any = None,
        found: Any = None,
        next: str | None = None,
        estimate: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(what, expected=expected, found=found, next=next)
        self.estimate = estimate

    def as_dict(self) -> dict[str, Any]:
        """Return the error as `--json` prints it, with the estimate."""
        return {**super().as_dict(), "estimate": self.estimate}
