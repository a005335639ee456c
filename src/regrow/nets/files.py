"""Whether a model's files are whole."""

from pathlib import Path

from regrow.nets.errors import ModelError, first_line


def check_safetensors(file: Path) -> None:
    """Assert that a safetensors file is whole: its header reads, and its length fits.

    Raises:
        ModelError: If not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            content.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged ({first_line(error)}); copy or download it again") from None
