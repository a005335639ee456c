"""A transformers model of changed shape: its class, and that of the model within it, with the widths in config.json.

Written by regrow beside the weights, so that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``
loads them where regrow is not installed. Needs torch and transformers. Licence: Apache-2.0.
"""

from typing import Any

import transformers  # noqa: F401 (named by the classes that are added below)

from .reshape_regrow import finish, reshape


def part(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the recorded differences of a module within the network, under the names that tensors have in it.

    Args:
        record: The differences of the whole network, as described in ``reshape_regrow.py``.
        prefix: What names in the module start with, dot included, such as ``model.``; empty for the whole network.
    """
    depth = len(prefix)
    within = {
        key: {f"{name}."[depth:-1]: value for name, value in record[key].items() if f"{name}.".startswith(prefix)}
        for key in ("tensors", "stands", "derived")
    }
    attributes = {}
    for where, number in record["attributes"].items():
        path, _, name = where.partition(":")
        if f"{path}.".startswith(prefix):
            attributes[f"{path}."[depth:-1] + f":{name}"] = number
    dropped = [name[depth:] for name in record["dropped"] if name.startswith(prefix)]
    return {**within, "attributes": attributes, "dropped": dropped}


class OwnType:
    """A configuration whose file names a model type of its own: without this code transformers refuses the folder.

    Under the family's type it would build the family's class and fill what the files lack with random numbers. In
    memory the type is the family's, by which transformers and peft choose what they do.
    """

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings in a file under the family's type, and the arguments that are none of them."""
        settings, others = super().get_config_dict(*args, **kwargs)  # type: ignore[misc, unused-ignore]
        return {**settings, "model_type": cls.model_type}, others  # type: ignore[attr-defined, unused-ignore]

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the settings that go into a file."""
        return {**super().to_diff_dict(), "model_type": f"regrow_{type(self).model_type}"}  # type: ignore[misc, attr-defined, unused-ignore]


class Regrown:
    """Gives a class of transformers the widths that ``config.json`` records: ``class New(Regrown, Original)``."""

    # What the names of this model start with in the files; empty for the whole network.
    prefix = ""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg, unused-ignore]
        reshape(self, part(config.regrow, self.prefix))  # type: ignore[arg-type, unused-ignore]
        self.tie_weights()  # type: ignore[attr-defined, unused-ignore]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does; raise ValueError unless every tensor came from the file in its recorded shape."""
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError("ignore_mismatched_sizes would put random numbers where sizes differ; leave it out")
        told = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc, unused-ignore]
        own = {name.partition(".")[0] for name in model.state_dict()}
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            found = sorted(map(str, info.get(what) or ()))
            if what == "unexpected_keys" and cls.prefix:  # what lies outside this model, such as the head
                found = [name for name in found if name.startswith(cls.prefix) or name.partition(".")[0] in own]
            if found:
                raise ValueError(f"the weights are not those of config.json: {what} {', '.join(found[:3])}")
        if getattr(model, "hf_quantizer", None) is None:  # quantised weights have shapes of their own
            finish(model, part(model.config.regrow, cls.prefix))
        return (model, info) if told else model
