"""Every error a user can cause, one class and one exit code a kind.

`builder/cli/app.py` is the only place that exits; everything else raises one of these.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

QUOTED = 2000  # characters


class BuildError(Exception):
    """What happened, what was expected, what was found, and the next command.

    Args:
        what: one sentence: what happened, naming the file, tensor, key or graph.
        expected: what would have been right.
        found: what is there instead.
        next: the command (or the edit) that gets the user on; the kind's own `otherwise` if None.
    """

    exit_code = 1
    otherwise: str | None = None

    def __init__(self, what: str, *, expected: Any = None, found: Any = None, next: str | None = None) -> None:
        super().__init__(what)
        self.what, self.expected, self.found = what, expected, found
        self.next = self.otherwise if next is None else next

    def __str__(self) -> str:
        lines = [shortened(self.what)]
        lines += [f"  expected: {shortened(self.expected)}"] if self.expected is not None else []
        lines += [f"  found:    {shortened(self.found)}"] if self.found is not None else []
        lines += [f"  next:     {self.next}"] if self.next is not None else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same for `--json`: strings only, `None` where nothing was said."""
        text = {key: getattr(self, key) for key in ("expected", "found", "next")}
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": shortened(self.what),
            **{key: None if value is None else shortened(value) for key, value in text.items()},
        }


def shortened(value: Any) -> str:
    """`value` as an error quotes it: a file can hold names of any length, and integers too long to be written."""
    try:
        text = str(value)
    except ValueError:
        text = f"a number of more than {sys.get_int_max_str_digits()} digits"
    return text if len(text) <= QUOTED else f"{text[: QUOTED // 2]} … {text[-QUOTED // 2 :]}"


class CheckpointError(BuildError):
    """Not a checkpoint, a file missing, truncated, or contradicting the config."""

    exit_code = 10
    otherwise = "fetch the checkpoint again, or save it again with `save_pretrained`"


class UnsupportedError(BuildError):
    """A checkpoint that is whole but of a kind that cannot be exported."""

    exit_code = 11
    otherwise = "README, «Build a checkpoint», says what can be exported"


class UnsafeError(BuildError):
    """Pickle weights, remote code demanded, or a path that leaves its folder."""

    exit_code = 12
    otherwise = "save the checkpoint again with `save_pretrained`, which writes safetensors and no code"


class RecipeError(BuildError):
    """An unknown key, a wrong type, or a combination that no target can run."""

    exit_code = 13
    otherwise = "edit the recipe; README, «Build a checkpoint», lists its keys"


class DownloadError(BuildError):
    """The hub could not be reached, or does not have what was asked for."""

    exit_code = 14
    otherwise = "run the same command again"


class PatchError(BuildError):
    """Upstream source that no patch was verified on, or a patch that never ran."""

    exit_code = 15
    otherwise = "`qwen3vl-onnx patches` shows every patch and its state"


class WeightError(BuildError):
    """A graph initializer without a checkpoint tensor, or a tensor that no graph uses."""

    exit_code = 16
    otherwise = "save the checkpoint again with `save_pretrained`; if it is right, see `qwen3vl-onnx patches`"


class PassError(BuildError):
    """A graph pass that the recipe expects to match and that did not."""

    exit_code = 17
    otherwise = "`qwen3vl-onnx patches`: an upstream change alters what is traced"


class ImageError(BuildError):
    """A file that is no picture, or a picture the model cannot take."""

    exit_code = 18
    otherwise = "give another file: PNG, JPEG, WebP …"


class OutputError(BuildError):
    """An output folder that holds something else, is in use, or cannot be written."""

    exit_code = 19
    otherwise = "give another --output"


class VerificationError(BuildError):
    """A gate that does not hold."""

    exit_code = 20
    otherwise = "read the report in `evidence/`"


class BundleError(BuildError):
    """A folder that is no bundle, or whose files differ from its manifest."""

    exit_code = 21
    otherwise = "build it again with `qwen3vl-onnx build`"


class MissingPackageError(BuildError):
    """A package that this command needs and that is not installed."""

    exit_code = 22
    otherwise = 'pip install "qwen3vl-onnx[build]"'


class PromptError(BuildError):
    """A prompt that the model or the runtime cannot take."""

    exit_code = 23
    otherwise = "shorten or change the prompt; a chat template must be one of Qwen3-VL's kind"


class CasesError(BuildError):
    """A file of cases that cannot be read, or that asks for what cannot be compared."""

    exit_code = 25
    otherwise = "edit the file; builder/reference/case_file.py shows all that it may say"


class GoldenError(BuildError):
    """A golden that cannot be read, or that was made from something else."""

    exit_code = 26
    otherwise = "make it again: qwen3vl-onnx golden CHECKPOINT --output FILE"


class SignatureError(BuildError):
    """A bundle that is not signed, or not by that key; a key that cannot be read."""

    exit_code = 27
    otherwise = "take the bundle again from where it was built, and the key from whoever signed it"


class UploadError(BuildError):
    """The hub could not be reached, or did not take what was sent."""

    exit_code = 28
    otherwise = "run the same command again: what has arrived is not sent again"


class ResourceError(BuildError):
    """A build that needs more disk or memory than there is.

    Args:
        estimate: every figure, as `build --dry-run --json` shows them (see `builder.stages.engine.dry_run`).
    """

    exit_code = 24
    otherwise = "`build --dry-run` shows what is needed: give another --output, or a machine with more memory"

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
        """The same, and the estimate."""
        return {**super().as_dict(), "estimate": self.estimate}
