"""The transformers-facing half of every language model; the only file that imports transformers' model classes.

A family file holds a config on :class:`~zoo.config.TextConfig`, blocks, and a :class:`Trunk`, all in plain torch.
:class:`CausalLM` makes the classes of transformers from them when the first model is built or an Auto class is asked
for: a ``PreTrainedConfig`` with the dataclass's fields (its ``arch()`` gives the dataclass back) and a
``PreTrainedModel`` with ``GenerationMixin`` around the trunk. What differs between releases of transformers stays here:
5.24 calls ``past_key_values`` ``cache``.

Letters in shapes: B batch, T tokens of this call, P tokens in the cache, D width, V vocabulary.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config import TextConfig
from zoo.errors import ConfigError, ShapeError, WeightsError, require
from zoo.layers.bit_linear import has_packed_layers
from zoo.registry import families, get_family, index


class TrunkCache:
    """What a trunk remembers of the tokens that it has read, so that it need not read them again.

    Attributes:
        config: Of the model that it belongs to; another model refuses it.
        length: Tokens read, padding included.
        tensors: Whatever the trunk keeps, by any key. The first dimension of each is the batch.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.length = 0
        self.tensors: dict[Any, Tensor] = {}

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order, repeated where they are named twice: ``[B]`` integers."""
        self.tensors = {key: tensor.index_select(0, rows.to(tensor.device)) for key, tensor in self.tensors.items()}

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            ConfigError: If this kind of cache cannot, as that of a recurrence.
        """
        if length < self.length:
            raise ConfigError(
                f"A recurrent state cannot go back from {self.length} to {length} tokens; read them again from the "
                "start, or keep a copy.deepcopy of the cache."
            )

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.tensors.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of the numbers, and not of how they were computed: PyTorch copies no tensor that autograd still needs."""
        copied = copy.copy(self)
        copied.__dict__.update({name: _detached_copy(value) for name, value in self.__dict__.items()})
        return copied

    @property
    def rows(self) -> int:
        """Size of the batch; 0 before anything was read."""
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _detached_copy(value: Any) -> Any:
    """Tensors in lists and dicts copied, all else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached_copy(each) for key, each in value.items()}
    return [_detached_copy(each) for each in value] if isinstance(value, list) else value


@dataclass
class TrunkOutput:
    """What a trunk returns."""

    hidden: Tensor  # [B, T, D], after the final norm
    loss: Tensor | None = None  # added to the cross-entropy in training, already weighted; a scalar
    states: list[Tensor] = dataclasses.field(default_factory=list)  # [B, T, D] each: embeddings, after each layer
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)  # becomes attributes of the model's output


class Trunk(nn.Module):
    """Base of the trunks: embedded tokens to hidden states. A subclass makes its own modules and :meth:`forward`.

    A module's own ``reset_parameters`` initialises what is not a linear layer, an embedding or a norm, and may correct
    its children, which are initialised before it, through ``torch.nn.init``'s functions. Linear layers and embeddings
    start at N(0, ``initializer_range``).

    Attributes:
        attributes: Class attributes for the transformers model, such as ``_no_split_modules``.
        embed_tokens: The input embeddings.
    """

    attributes: ClassVar[Mapping[str, Any]] = {}
    embed_tokens: nn.Embedding

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.arch = config
        self.gradient_checkpointing = False  # transformers sets it, and the function below

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TrunkCache | None = None,
        keep_states: bool = False,
        **options: Any,
    ) -> TrunkOutput:
        """Run all layers.

        Args:
            x: Embedded tokens, ``[B, T, D]``.
            mask: True for tokens, False for padding, ``[B, P + T]``; None when all are tokens.
            position_ids: ``[B, T]`` or ``[1, T]``, counted from the beginning of each document; None: from P on.
            cache: What came before, updated in place; None to remember nothing.
            keep_states: Fill :attr:`TrunkOutput.states`.
            options: What else the model's ``forward`` was given, for example by a trainer.
        """
        raise NotImplementedError

    def make_cache(self) -> TrunkCache:
        """An empty cache for this trunk."""
        return TrunkCache(self.arch)

    def make_head(self) -> nn.Linear:
        """The layer from hidden states to logits, without a bias."""
        return nn.Linear(self.arch.hidden_size, self.arch.vocab_size, bias=False)

    def run(self, layer: nn.Module, *args: Any) -> Any:
        """``layer(*args)``, its activations recomputed in the backward pass when gradient checkpointing is on."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            recompute: Callable[..., Any] = getattr(self, "_gradient_checkpointing_func", None) or checkpoint
            options = {} if hasattr(self, "_gradient_checkpointing_func") else {"use_reentrant": False}
            return recompute(layer.__call__, *args, **options)
        return layer(*args)


class CausalLM:
    """The ``model`` of a language model's :class:`~zoo.registry.Family`: a config in, a transformers model out.

    Args:
        name: What the classes' names begin with: ``<name>Config``, ``<name>ForCausalLM``.
        model_type: transformers' name for the family, and zoo's.
        config: The config dataclass.
        trunk: The trunk class.
        foreign: Other ``model_type``s whose checkpoints are this family's: a function from the values of their
            ``config.json`` to the config's fields.
        key_mapping: Their parameters' names, regular expressions to replacements.
        layer_types: transformers' words for the layers of a config, for those who look at them.
    """

    def __init__(
        self,
        name: str,
        *,
        model_type: str,
        config: type[TextConfig],
        trunk: type[Trunk],
        foreign: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] | None = None,
        key_mapping: Mapping[str, str] | None = None,
        layer_types: Callable[[Any], list[str]] | None = None,
    ) -> None:
        self.name = name
        self.model_type = model_type
        self.config = config
        self.trunk = trunk
        self.foreign = dict(foreign or {})
        self.key_mapping = dict(key_mapping or {})
        self.layer_types = layer_types

    def __call__(self, config: TextConfig) -> nn.Module:
        require("transformers", extra="lm", why=self.name)
        return self.models[self.model_type](self.configs[self.model_type](**config.to_dict()))

    @cached_property
    def configs(self) -> dict[str, Any]:
        """The subclasses of transformers' ``PreTrainedConfig``, made on first use, by ``model_type``: zoo's first."""
        made = {self.model_type: _config_class(self, self.model_type, self.name, None)}
        for model_type, translate in self.foreign.items():
            name = "".join(part.capitalize() for part in model_type.split("_"))
            made[model_type] = _config_class(self, model_type, name, translate)
        return made

    @cached_property
    def models(self) -> dict[str, Any]:
        """The subclasses of ``PreTrainedModel``, likewise."""
        return {
            model_type: _model_class(self, config, config.__name__.removesuffix("Config"))
            for model_type, config in self.configs.items()
        }

    def register_configs(self) -> None:
        """Make the config classes known to ``AutoConfig``."""
        from transformers import AutoConfig

        for model_type, config in self.configs.items():
            AutoConfig.register(model_type, config, exist_ok=True)

    def register_models(self) -> None:
        """Make the model classes known to ``AutoModelForCausalLM``."""
        from transformers import AutoModelForCausalLM

        for model_type, model in self.models.items():
            AutoModelForCausalLM.register(self.configs[model_type], model, exist_ok=True)


def causal_lms() -> list[CausalLM]:
    """Those of all known families; loads the modules of zoo's own language models."""
    for name in {entry["family"] for entry in index().values() if entry["task"] == "text-generation"}:
        get_family(name)
    text = [family for family in families() if family.task == "text-generation"]
    return [family.model for family in text if isinstance(family.model, CausalLM)]


def cache_of(output: Any) -> Any:
    """The cache in a model's output, under the name that this release of transformers gives it."""
    return output.get("cache", output.get("past_key_values"))


def __getattr__(name: str) -> Any:
    """The classes by name, which pickle and spawned processes look for here."""
    kind = "configs" if name.endswith("Config") else "models" if name.endswith("ForCausalLM") else ""
    for made in (getattr(each, kind) for each in causal_lms()) if kind else ():
        for found in made.values():
            if found.__name__ == name:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _config_class(
    lm: CausalLM, model_type: str, name: str, translate: Callable[[Mapping[str, Any]], dict[str, Any]] | None
) -> Any:
    from transformers import PreTrainedConfig

    names = [spec.name for spec in fields(lm.config)]

    class Config(PreTrainedConfig):
        __doc__ = f"transformers' view of {lm.config.__name__}; ``arch()`` gives it back."

        def __init__(self, use_cache: bool = True, **values: Any) -> None:
            if translate is not None:
                values = {**values, **translate(values)}
            own = {key: values.pop(key) for key in names if key in values}
            arch = lm.config(**own)
            everything = {**arch.to_dict(), "use_cache": use_cache}
            if lm.layer_types is not None:
                values.pop("layer_types", None)
                everything["layer_types"] = lm.layer_types(arch)
            for key, value in everything.items():
                setattr(self, key, value)
            super().__init__(**values)
            for key, value in everything.items():  # which the base class may have set to its own defaults
                setattr(self, key, value)

        def arch(self) -> TextConfig:
            """The family's config."""
            return lm.config(**{key: getattr(self, key) for key in names})

    Config.model_type = model_type
    setattr(Config, "keys_to_ignore_at_inference", ["past_key_values", "cache"])  # noqa: B010
    Config.__name__ = Config.__qualname__ = f"{name}Config"
    return Config


def _cache_class() -> Any:
    """transformers' view of a :class:`TrunkCache`; made once."""
    global _made_cache_class
    if _made_cache_class is not None:
        return _made_cache_class
    from transformers import Cache

    class StateCache(Cache):
        """A language model's memory of the tokens that it has read, in ``state``."""

        def __init__(self, state: TrunkCache) -> None:
            super().__init__(layers=[])
            self.state = state

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.state.length

        def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
            length = query_length if isinstance(query_length, int) else len(query_length)
            return self.state.length + length, 0

        def get_max_length(self, layer_idx: int | None = None) -> int:
            return -1  # no limit

        get_max_cache_shape = get_max_length

        def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
            return self.state.length > 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.state.select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            self.state.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            self.state.select(torch.arange(self.state.rows).repeat_interleave(repeats))

        def crop(self, tokens: int) -> None:
            """Keep so many tokens, or, for a negative number, remove so many."""
            if tokens < -self.state.length:
                raise ShapeError(f"The cache holds {self.state.length} tokens; expected at most so many to be removed.")
            self.state.crop(tokens if tokens > 0 else self.state.length + tokens)

        def reset(self) -> None:
            self.state.reset()

        def __len__(self) -> int:
            return self.state.config.num_hidden_layers

        @property
        def batch_size(self) -> int:
            return self.state.rows or -1

        @property
        def is_compileable(self) -> bool:
            return False  # else masks would not come as the plain two-dimensional ones

        @property
        def is_initialized(self) -> bool:
            return self.state.length > 0

        @property
        def is_croppable(self) -> bool:
            return type(self.state).crop is not TrunkCache.crop

        @property
        def is_sliding(self) -> list[bool]:
            return [False] * len(self)

        @property
        def is_linear(self) -> list[bool]:
            return [False] * len(self)  # else generate would not cut off the tokens that are in the cache already

    _made_cache_class = StateCache
    return StateCache


_made_cache_class: Any = None


def _model_class(lm: CausalLM, config_class: Any, name: str) -> Any:
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    state_cache = _cache_class()
    # The name of the cache in arguments and outputs: "cache" since 5.24.
    slot = "cache" if "cache" in {spec.name for spec in fields(CausalLMOutputWithPast)} else "past_key_values"

    class ForCausalLM(PreTrainedModel, GenerationMixin):
        __doc__ = f"{lm.name} with a language-modelling head: token ids ``[B, T]`` to logits ``[B, T, V]``."

        config: config_class  # type: ignore[valid-type]
        base_model_prefix = "model"
        supports_gradient_checkpointing = True
        _skip_keys_device_placement = ["past_key_values", "cache"]
        _supports_sdpa = True  # where a family has attention at all

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = lm.trunk(config.arch())
            self.lm_head = self.model.make_head()
            self.post_init()
            if config.tie_word_embeddings:
                self.register_state_dict_post_hook(_leave_tied_out)
                self.register_load_state_dict_pre_hook(_put_tied_back)
                self.register_load_state_dict_post_hook(_tie_again)

        # Initialisation, embeddings

        def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
            if self.config.tie_word_embeddings and self.lm_head.weight.is_meta:
                self.lm_head.weight = self.model.embed_tokens.weight  # in no file, so that nothing else fills it
            return super().tie_weights(*args, **kwargs)

        def _init_weights(self, module: nn.Module) -> None:
            """Called by transformers for every module, children first; what was loaded keeps its values."""
            if isinstance(module, nn.Linear | nn.Embedding | nn.RMSNorm | nn.LayerNorm):
                super()._init_weights(module)
            elif callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]

        def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
            # As for transformers' own models: for custom code it would skip modules without parameters of their own,
            # and ours may correct their children.
            super()._initialize_weights(module)

        def get_input_embeddings(self) -> nn.Module:
            return self.model.embed_tokens

        def set_input_embeddings(self, value: nn.Module) -> None:
            self.model.embed_tokens = value

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
            old = self.lm_head
            if isinstance(old, nn.Linear) and type(new_embeddings) is nn.Linear and type(old) is not nn.Linear:
                # transformers resizes into a plain linear layer: a head that does more takes over its weight.
                old.weight, old.out_features = new_embeddings.weight, new_embeddings.out_features
            else:
                self.lm_head = new_embeddings

        def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
            if has_packed_layers(self):
                raise ConfigError("The model is packed, which fixes its vocabulary; resize it first, then pack it.")
            return super().resize_token_embeddings(*args, **kwargs)

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            if has_packed_layers(self):
                raise WeightsError(
                    "The model is packed, which no config.json says, so that from_pretrained would fill it at random; "
                    "write it with zoo.pretrained.packed.save_packed, or save() of what zoo.optimize gave."
                )
            return super().save_pretrained(*args, **kwargs)

        # The forward pass

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Any = None,
            inputs_embeds: Tensor | None = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int | Tensor = 0,
            output_hidden_states: bool | None = None,
            return_dict: bool | None = None,
            cache: Any = None,
            **kwargs: Any,
        ) -> Any:
            """Logits, and the loss where there are labels.

            Args:
                input_ids: ``[B, T]``; or ``inputs_embeds``, ``[B, T, D]``, in their place.
                attention_mask: 1 for tokens and 0 for padding, on either side, ``[B, T]`` or with the cache's tokens.
                position_ids: ``[B, T]``; where they go back to 0, a new document begins that sees nothing before.
                past_key_values, cache: What an earlier call returned under this name; one of them.
                labels: ``[B, T]``, -100 where nothing is to be predicted; shifted here.
                use_cache: Return a cache; by default in eval mode only.
                logits_to_keep: Only the logits of the last so many tokens, or of these positions; 0 for all.
                kwargs: For the loss and for the trunk.

            Raises:
                ShapeError: If there are no tokens, or one is not in the vocabulary.
                ConfigError: If the cache is another model's.
            """
            x = self._embed(input_ids, inputs_embeds)
            past = past_key_values if cache is None else cache
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            if use_cache and past is None:
                past = self.make_cache()
            if past is not None:
                self._check_cache(past, len(x))
            if output_hidden_states is None:
                output_hidden_states = bool(self.config.output_hidden_states)
            out = self.model(
                x,
                mask=self._mask(attention_mask, x, past),
                position_ids=position_ids,
                cache=None if past is None else past.state,
                keep_states=output_hidden_states,
                labels=labels,
                **kwargs,
            )
            if past is not None:
                past.state.length += x.shape[1]
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(out.hidden[:, kept])
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
                loss = loss if out.loss is None else loss + out.loss
            answer = CausalLMOutputWithPast(
                loss=loss,
                logits=logits,
                hidden_states=tuple(out.states) if output_hidden_states else None,
                **{slot: past},
            )
            for key, value in out.extras.items():
                setattr(answer, key, value)
            plain = self.config.return_dict is False if return_dict is None else not return_dict
            return answer.to_tuple() if plain else answer

        def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
            if (input_ids is None) == (inputs_embeds is None):
                raise ShapeError("Expected either input_ids or inputs_embeds, and not both.")
            given = input_ids if inputs_embeds is None else inputs_embeds
            assert given is not None
            if given.ndim != (2 if inputs_embeds is None else 3) or 0 in given.shape:
                raise ShapeError(
                    f"The input is {list(given.shape)}; expected [batch, tokens] with at least one token in each row"
                    + (", and its embeddings." if inputs_embeds is not None else ".")
                )
            if inputs_embeds is not None:
                return inputs_embeds
            assert input_ids is not None
            if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would be a wait
                low, high = (int(bound) for bound in input_ids.aminmax())
                known = self.model.embed_tokens.num_embeddings
                if low < 0 or high >= known:
                    raise ShapeError(
                        f"Token {low if low < 0 else high} is not in the vocabulary; expected 0 to {known - 1}."
                    )
            return self.model.embed_tokens(input_ids)

        def _mask(self, mask: Tensor | None, x: Tensor, past: Any) -> Tensor | None:
            """A mask of transformers as the trunk wants it: ``[B, P + T]`` bool, or None when nothing is padding."""
            if mask is None:
                return None
            before = 0 if past is None else past.state.length
            if mask.ndim != 2 or len(mask) != len(x) or mask.shape[1] not in (x.shape[1], before + x.shape[1]):
                raise ShapeError(
                    f"attention_mask is {list(mask.shape)}; expected {[len(x), x.shape[1]]}, or with the "
                    f"{before} tokens of the cache {[len(x), before + x.shape[1]]}."
                )
            mask = mask.bool()
            if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
                return None
            missing = before + x.shape[1] - mask.shape[1]
            return nn.functional.pad(mask, (missing, 0), value=True) if missing else mask

        def _check_cache(self, past: Any, rows: int) -> None:
            if not isinstance(past, state_cache):
                raise ConfigError(
                    f"The cache is a {type(past).__name__}; expected what {type(self).__name__} returned, or "
                    "make_cache()."
                )
            mine, theirs = self.model.arch, past.state.config
            differing = [key for key, value in mine.to_dict().items() if getattr(theirs, key, None) != value]
            differing = [key for key in differing if key not in ("vocab_size", *_TOKEN_IDS)]
            if type(theirs) is not type(mine) or differing:
                what = ", ".join(differing) or type(theirs).__name__
                raise ConfigError(f"The cache is of another config ({what} differ); expected one that this model made.")
            if past.state.rows and past.state.rows != rows:
                raise ShapeError(f"The cache holds {past.state.rows} sequences, the input {rows}; expected as many.")

        def make_cache(self) -> Any:
            """An empty cache, for ``forward`` and ``generate``."""
            return state_cache(self.model.make_cache())

        # Generation

        def _prepare_cache_for_generation(  # type: ignore[override]
            self, generation_config: Any, model_kwargs: Any, *args: Any
        ) -> None:
            if model_kwargs.get(slot) is None and generation_config.use_cache is not False:
                if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
                    raise ConfigError(
                        f"cache_implementation is {generation_config.cache_implementation!r}; "
                        f"{type(self).__name__} has a cache of its own, leave it out."
                    )
                model_kwargs[slot] = self.make_cache()
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]

        def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            if kwargs.get("is_first_iteration") and mask is not None and mask.shape[1] and not bool(mask[:, -1].all()):
                raise ConfigError(
                    "attention_mask says that a row ends with padding, so there is nothing to continue from; expected "
                    "padding on the left: tokenizer.padding_side = 'left'."
                )
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

        def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
            given = inputs if inputs is not None else kwargs.get("input_ids")
            if isinstance(given, Tensor) and given.ndim == 2 and 0 in given.shape and "inputs_embeds" not in kwargs:
                raise ShapeError(
                    f"The prompt is {list(given.shape)}; expected at least one token in each row, such as the "
                    f"beginning of text, {self.config.bos_token_id}."
                )
            return super().generate(inputs, *args, **kwargs)

        # Loading

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
            """As transformers' own; reads the layouts of others too, and refuses weights that are no numbers."""
            if lm.key_mapping and kwargs.get("key_mapping") is None:
                kwargs["key_mapping"] = lm.key_mapping
            loaded = super().from_pretrained(*args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            for key, tensor in model.named_parameters():
                if not tensor.is_meta and not bool(tensor.isfinite().all()):
                    raise WeightsError(f"{key} holds values that are NaN or infinite; the training diverged.")
            return loaded

    for key, value in lm.trunk.attributes.items():
        setattr(ForCausalLM, key, value)
    ForCausalLM.config_class = config_class
    ForCausalLM._tied_weights_keys = {
        "lm_head.weight": "model.embed_tokens.weight",
        **lm.trunk.attributes.get("_tied_weights_keys", {}),
    }
    ForCausalLM.__name__ = ForCausalLM.__qualname__ = f"{name}ForCausalLM"
    return ForCausalLM


# A tied head is in no state dict: one tensor under two names is no safetensors file, and would be loaded as two.


def _leave_tied_out(model: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state.pop(f"{prefix}lm_head.weight", None)


def _put_tied_back(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    embeddings = state.get(f"{prefix}model.embed_tokens.weight")
    if embeddings is not None:
        state.setdefault(f"{prefix}lm_head.weight", embeddings)


def _tie_again(model: Any, _keys: Any) -> None:
    """Loading by assignment makes two parameters of one tensor."""
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.weight = model.model.embed_tokens.weight


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
