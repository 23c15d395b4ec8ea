"""Task ids and masks of one forward: the tokens that each adapted layer sees, their tasks, and whether they count.

| source of a layer's tokens | how many | task ids | which count |
|---|---|---|---|
| TOKENS: the model's own; of an encoder-decoder the encoder's, which cross-attention reads too | [B, S] | [B] or [B, S] | attention_mask |
| DECODER: those of an encoder-decoder's decoder | [B, S'] | [B] | decoder_attention_mask, else those with a label |
| SAMPLES: one vector a sample, of a pooler say | [B] | [B] | all |
| ROUTED: TOKENS, each as often as it has experts in a row (adapters/adapted_experts.py) | [B, S k] | as TOKENS | as TOKENS |

S and S' may be alike, so lengths alone tell nothing: a layer's source is found in its first forward and kept
(AlignState.sources). What is not known is refused.
"""  # noqa: E501

import torch
from torch import Tensor

from align_ext.alignment.guards import world_size
from align_ext.alignment.model_state import AlignState
from align_ext.config import MOST_TASKS
from align_ext.losses.tokens import LayerTokens, TokenTasks
from align_ext.ops import group_rows

NO_TASK = -1
TOKENS, DECODER, SAMPLES, ROUTED = "tokens", "decoder", "samples", "routed"
ENCODER = "encoder"  # a part of a model, as the decoder is
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Place = tuple[int, torch.Size]  # where a tensor lies, and its shape
_NOT_LEARNED = (
    "the compiled layer {name!r} of an encoder-decoder has not run yet without torch.compile, so that it is unknown "
    "whether it sees the encoder's tokens or the decoder's: run one step of the plain model first"
)
_PADDING_UNKNOWN = (
    "which of the decoder's tokens that {name!r} sees are padding is unknown: give the model decoder_attention_mask, "
    "or labels of the decoder's tokens"
)


def number_of_tasks(ids: Tensor) -> int:
    """One more than the largest id, and 1 at least.

    Raises:
        ValueError: there would be more than 10,000 tasks, of which every layer has a table.
    """
    most = int(ids.max()) if ids.numel() else 0
    if most >= MOST_TASKS:
        raise ValueError(f"task_ids must be below {MOST_TASKS}, got {most}")
    return max(most + 1, 1)


class StepTokens:
    """The task ids and masks of one forward.

    Args:
        state: of the model.
        ids: [B] or [B, S]; None: all tokens are of one task (where no loss tells tasks apart).
        like: a tensor on the device of the ids.
        records: layers hand over their outputs; False for evaluation.
    """

    def __init__(self, state: AlignState, ids: Tensor | None, like: Tensor, *, records: bool = True) -> None:
        self.state, self.records, self.masked = state, records, False
        self.labels: Tensor | None = None  # given beside a mask that the model's own forward knows
        self._known = ids is not None
        self.given = torch.zeros(1, dtype=torch.int64, device=like.device) if ids is None else self._check(ids, like)
        self.all_tokens = self.tokens = TokenTasks(self.given)  # tokens: those that count in the losses
        self.of_decoder: TokenTasks | None = None  # the decoder's tokens that count
        self._of_samples: TokenTasks | None = None
        self._repeated: dict[int, TokenTasks] = {}  # by k: the tokens that count, k times each
        self._of_routed: dict[int, TokenTasks] = {}  # by layer
        self._orders: dict[tuple[torch.device, int], Tensor] = {}
        self.memories: list[Place] = []  # the encoder's outputs that the decoder reads
        self.prompt: Tensor | None = None  # bool [B, S]: tokens before the first label, without padding
        self.decoding = False  # the tokens follow others, whose keys and values are cached

    def _check(self, ids: Tensor, like: Tensor) -> Tensor:
        if ids.dim() not in (1, 2) or ids.dtype not in _INTEGERS:
            raise ValueError(f"task_ids must be integers, [B] or [B, S], got {ids.dtype} {list(ids.shape)}")
        config, state, ids = self.state.config, self.state, ids.to(like.device, torch.int64)
        if state.encoder_decoder and ids.dim() == 2:
            raise ValueError(
                f"task_ids {list(ids.shape)}: the encoder and the decoder see tokens of their own: give one id per "
                "sample, [B]"
            )
        if config.num_tasks is None:
            if world_size() > 1:
                raise ValueError("num_tasks must be given when several processes train: every process needs the same")
            tasks = max(state.tasks, number_of_tasks(ids))
        else:
            tasks = state.tasks
        # Every token runs through an adapter: with one for each task, no token can be without.
        least = 0 if config.row.by_task else NO_TASK
        allowed = f"task_ids must be in 0 .. num_tasks-1 = {tasks - 1}" + ("" if least == 0 else ", or -1 for none")
        if ids.is_cuda:
            torch._assert_async(((ids >= least) & (ids < tasks)).all(), allowed)  # does not wait for the device
        elif ids.numel():
            low, high = map(int, ids.aminmax())
            if low < least or high >= tasks:
                raise ValueError(f"{allowed}; got {low} .. {high}")
        state.tasks = tasks
        return ids

    def with_choices(self, count: int) -> None:
        """Gives each of a sample's choices, which run as rows of their own, the sample's task."""
        if self._known:
            self.given = self.given.repeat_interleave(count, 0)
            self.all_tokens = self.tokens = TokenTasks(self.given)
            self._orders = {}

    def mask(self, attention_mask: Tensor | None, labels: Tensor | None) -> None:
        """Takes padding, and with response_only tokens without a label, out of the statistics."""
        keep, config = None, self.state.config
        labels = self.labels if labels is None else labels
        if attention_mask is not None:
            keep = _padding(attention_mask, "attention_mask")
        self.masked, self.labels = True, labels
        if config.routing == "sequence":
            self.prompt = _prompt_of(keep, labels, self._of_tokens(labels, keep), training=self.records)
        if config.response_only and self.records:
            if labels is None:
                raise ValueError("response_only=True needs labels in the batch (or align_step(..., labels=labels))")
            if not self._of_tokens(labels, keep):
                raise ValueError(
                    f"response_only=True needs a label for each token, but labels are {labels.dtype} "
                    f"{list(labels.shape)}: leave it out for a model that labels whole samples"
                )
            keep = labels != -100 if keep is None else keep & (labels != -100)
        if keep is not None:
            self.tokens = self._counting(keep)

    @staticmethod
    def _of_tokens(labels: Tensor | None, keep: Tensor | None) -> bool:
        """Whether labels are one for each token."""
        if labels is None or labels.dim() != 2 or labels.is_floating_point():
            return False
        return keep is None or labels.shape == keep.shape

    def _counting(self, keep: Tensor) -> TokenTasks:
        given = self.given
        ids = given[:, None] if given.dim() == 1 else given
        self.check_samples(keep.shape[0])
        if ids.shape[0] not in (1, keep.shape[0]) or ids.shape[1] not in (1, keep.shape[1]):
            raise ValueError(f"task_ids {list(given.shape)} do not fit a batch of {list(keep.shape)} tokens")
        return TokenTasks(torch.where(keep.to(ids.device), ids, NO_TASK))

    def check_samples(self, samples: int) -> None:
        """Raises ValueError if the ids that were given are those of another number of samples."""
        if torch.compiler.is_compiling():  # the size of the ids must not become part of the graph
            return
        if self._known and len(self.given) != samples:
            raise ValueError(f"task_ids {list(self.given.shape)} do not fit a batch of {samples} samples: give one id "
                             "per sample, or one per token")  # fmt: skip

    def mask_decoder(self, mask: Tensor | None, labels: Tensor | None) -> None:
        """Takes padding of the decoder's tokens out: by its mask, or else those that predict no label."""
        labels = self.labels if labels is None else labels
        if mask is not None:
            self.of_decoder = self._counting(_padding(mask, "decoder_attention_mask"))
        elif labels is not None and self._of_tokens(labels, None):
            self.of_decoder = self._counting(labels != -100)

    def learn(self, layer: int, x: Tensor, part: str | None) -> None:
        """Finds the source of the tokens of an encoder-decoder's layer, by its first input x.

        Args:
            layer: its number.
            x: its input.
            part: ENCODER or DECODER, where the layer is; None: in neither.

        Raises:
            RuntimeError: it is neither known to be the encoder's nor the decoder's.
        """
        name: str = self.state.names[layer]
        source: str | None = None
        if x.dim() == 2 and len(x) == self.tokens.ids.shape[0]:
            source = SAMPLES
        elif part == ENCODER or place_of(x) in self.memories:
            source = TOKENS
        elif part == DECODER and x.dim() == 3:
            if self.of_decoder is None:
                raise RuntimeError(_PADDING_UNKNOWN.format(name=name))
            # The decoder may compute keys of its own from an output of the encoder.
            made = {shape[1] for _, shape in self.memories if len(shape) == 3}
            source = {self.of_decoder.ids.shape[1]: DECODER}.get(x.shape[1], TOKENS if x.shape[1] in made else None)
        if source is None:
            raise RuntimeError(
                f"the layer {name!r} saw {list(x.shape)}, neither the encoder's tokens nor the decoder's: leave it out "
                "by exclude_modules"
            )
        if self.state.config.align == "mmd" and {source, *self.state.sources.values()} > {source}:
            raise RuntimeError(
                f'align="mmd" compares the same tokens in all layers, but {name!r} sees others than the layers '
                "before it: adapt the encoder's layers or the decoder's alone (exclude_modules), or use align=\"kl\""
            )
        self.state.sources[layer] = source

    def order(self, x: Tensor) -> Tensor:
        """The tokens of a layer's input x in the order of their tasks, padded ones too (ops.group_rows); cached."""
        tokens = x.shape[:-1].numel()
        self.all_tokens.check(tokens)
        self.check_layout(x.shape)
        order = self._orders.get((x.device, tokens))
        if order is None:
            ids = self.all_tokens.expand(x.device, tokens)
            order = self._orders[x.device, tokens] = group_rows(ids, self.state.tasks)
        return order

    def check_layout(self, shape: torch.Size) -> None:
        """Raises RuntimeError if a layer's input [..., n] is not batch first, or nothing has told yet whether it is."""
        if torch.compiler.is_compiling() or len(shape) < 3:  # as in check_samples
            return
        samples = self.tokens.ids.shape[0]
        if samples > 1 and shape[0] != samples:
            raise RuntimeError(
                f"an adapted layer saw {list(shape)} in a batch of {samples} samples: its tokens are not batch first, "
                "or not the batch's; leave it out by exclude_modules"
            )
        self.state.batch_first |= shape[1] != samples
        if samples > 1 and not self.state.batch_first and not self.state.encoder_decoder:
            raise RuntimeError(
                f"an adapted layer saw {list(shape)} in a batch of {samples} samples, whose first dimension may be "
                "the samples or the tokens: let the first batch have another number of samples than of tokens"
            )

    def check_tokens(self, layer: int, count: int) -> None:
        """Raises RuntimeError if a layer saw other tokens than those of its source."""
        name, sources = self.state.names[layer], self.state.sources
        if layer not in sources and self.state.encoder_decoder:
            raise RuntimeError(_NOT_LEARNED.format(name=name))
        ids = self.tokens.ids
        if sources.get(layer) == ROUTED and ids.dim() == 2 and ids.shape[1] > 1 and ids.numel():
            self._of_routed[layer] = self._times(count // ids.numel())
        if layer not in sources and ids.dim() == 2 and ids.numel() != count == ids.shape[0]:
            sources[layer] = SAMPLES
        self.tokens_of(layer).check(count, name)
        if sources.get(layer) == SAMPLES and count != len(ids):
            raise RuntimeError(
                f"the aligned layer {name!r} saw one vector a sample before, and now {count} of {len(ids)} samples: "
                "its tokens are routed or pooled in a way that is not known; leave it out by exclude_modules"
            )

    def _times(self, k: int) -> TokenTasks:
        """The tokens that count, each k times in a row."""
        if k not in self._repeated:
            self._repeated[k] = TokenTasks(self.tokens.ids.repeat_interleave(k, 1))
        return self._repeated[k]

    def tokens_of(self, layer: int) -> TokenTasks:
        """The tokens that count of those which a layer sees."""
        source = self.state.sources.get(layer, TOKENS)
        if source == ROUTED:  # ids of samples are repeated over whatever the samples hold
            return self._of_routed.get(layer, self.tokens)
        if source == DECODER:
            if self.of_decoder is None:
                raise RuntimeError(_PADDING_UNKNOWN.format(name=self.state.names[layer]))
            return self.of_decoder
        if source == SAMPLES:
            if self.given.dim() == 2 and self.given.shape[1] > 1:
                raise RuntimeError(
                    f"{self.state.names[layer]!r} sees one vector a sample, but task_ids are one per token: give one "
                    "per sample, or leave the layer out by exclude_modules"
                )
            self._of_samples = self._of_samples or TokenTasks(self._one_a_sample())
            return self._of_samples
        return self.tokens

    def _one_a_sample(self) -> Tensor:
        samples = self.tokens.ids.shape[0]
        return self.given.reshape(-1).expand(samples) if len(self.given) == 1 else self.given.reshape(-1)

    @property
    def counting(self) -> TokenTasks:
        """The tokens that count, layer by layer where they see different ones."""
        others = {layer: self.tokens_of(layer) for layer, source in self.state.sources.items() if source != TOKENS}
        return LayerTokens(self.tokens.ids, self.tokens, others) if others else self.tokens

    @property
    def aligned_tokens(self) -> TokenTasks:
        """The tokens that count in the alignment: by position padding does too."""
        return self.all_tokens if self.state.config.align_statistics == "position" else self.counting


def place_of(x: Tensor) -> Place:
    """Where a tensor lies, and its shape: what two names of one tensor share."""
    return x.data_ptr(), x.shape


def _padding(mask: Tensor, name: str) -> Tensor:
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            f"{name} must be [B, S] to tell padding, got {shape}: for other masks give ids per token, "
            "-1 where a token does not count, and align_step(model, ids, attention_mask=ones)"
        )
    return mask != 0


def _prompt_of(keep: Tensor | None, labels: Tensor | None, of_tokens: bool, *, training: bool) -> Tensor | None:
    """The tokens of each sequence before its first label, bool [B, S], without padding; None: all tokens.

    Pooling over more would let a token's routing depend on tokens that come after it. Labels of whole samples are no
    tokens' answers.
    """
    if labels is None:
        if training:
            raise ValueError('routing="sequence" pools over the tokens before the first label: it needs labels in the '
                             "batch (or align_step(..., labels=labels))")  # fmt: skip
        return keep
    if not of_tokens:
        return keep
    before = (labels != -100).int().cumsum(1) == 0
    return before if keep is None else before & keep
