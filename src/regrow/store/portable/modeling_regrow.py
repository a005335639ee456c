"""A transformers model of changed shape: a subclass of its class, with the widths recorded in config.json.

Written by regrow beside the weights, so that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``
loads them where regrow is not installed. Needs torch and transformers. Licence: Apache-2.0.
"""

from typing import Any

from transformers import PreTrainedModel as Base

from .reshape_regrow import finish, reshape


class Regrown(Base):  # type: ignore[misc, valid-type, unused-ignore]
    """The original class, with the widths that ``config.json`` records."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        reshape(self, config.regrow)
        self.tie_weights()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as usual, and raise ValueError unless every tensor came from the file in its recorded shape."""
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError("ignore_mismatched_sizes would put random numbers where sizes differ; leave it out")
        told = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found := sorted(map(str, info.get(what) or ())):
                raise ValueError(f"the weights are not those of config.json: {what} {', '.join(found[:3])}")
        if getattr(model, "hf_quantizer", None) is None:  # quantised weights have shapes of their own
            finish(model, model.config.regrow)
        return (model, info) if told else model
