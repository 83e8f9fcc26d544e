"""A model to talk to, from a folder, a hub name or a checkpoint; it streams the answers that ``predict`` generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.writing import checkpoint_of
from lightning_sft.data.batches.loader import PromptBatch
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode import encode_prompt
from lightning_sft.data.tokens.template_config import configured
from lightning_sft.evaluation.generation import Sampling, answers
from lightning_sft.export.restore import restored, tokenizer_of
from lightning_sft.io.arguments import check_arguments
from lightning_sft.machine.terminal import printable
from lightning_sft.model.pretrained import load_exported, load_model, load_tokenizer
from lightning_sft.model.tuning.adapters import merge
from lightning_sft.training.checks import bfloat16_is_slow
from lightning_sft.types import Conversation, InputError, Message


class Speaker:
    """A model with its tokenizer and the chat template that it was trained with.

    Args:
        name: A hub name, a folder, a GGUF file, a checkpoint of any strategy, or the folder of a run with checkpoints.
        chat_template: A Jinja file to use instead of the tokenizer's template.
        device: Device to run on; by default the GPU if there is one.

    Raises:
        InputError: When the model cannot be loaded.
    """

    def __init__(self, name: str | Path, chat_template: str | Path | None = None, device: str | None = None) -> None:
        check_arguments(Speaker, locals(), "chat")
        self.name = str(name)
        where = torch.device(device or _best_device())
        self.model, self.tokenizer = _load(checkpoint_of(name), chat_template)
        if (
            where.type == "cpu"
            and self.model.dtype != torch.float32
            and (self.model.dtype == torch.float16 or bfloat16_is_slow())
        ):
            self.model.float()
        torch.nn.Module.to(self.model, where)
        self.model.eval()

    @property
    def system(self) -> str | None:
        """System prompt that conversations of the training were given where they had none."""
        return configured(self.tokenizer).system

    @torch.no_grad()
    def answer(
        self,
        messages: Sequence[Message],
        say: Callable[[str], None],
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
    ) -> Message:
        """Generate the answer to a conversation, streamed piece by piece and returned at the end.

        Prompt and stop tokens are those of :func:`lightning_sft.evaluation.generation.answers`. The answer is the turn
        that the chat template would write as what was generated, so the next prompt is one that training has made, too.
        Ctrl-C interrupts the generation, and the text so far is the answer.

        Args:
            messages: Messages of the conversation, ending with the one to answer.
            say: Function called with each piece of text, from which terminal control characters are removed.
            max_new_tokens: Maximum number of tokens of the answer.
            sampling: Sampling settings; greedy by default. Each turn draws different random numbers.

        Raises:
            InputError: When the template refuses the conversation, or it exceeds the model's context.
        """
        prompt = replace(encode_prompt(Conversation(messages, provenance="chat"), self.tokenizer), number=len(messages))
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and len(prompt.input_ids) >= context:
            raise InputError(
                f"The conversation has {len(prompt.input_ids):,} tokens, the model's context {context:,}. Use /reset."
            )
        room = min(max_new_tokens, context - len(prompt.input_ids)) if context else max_new_tokens
        pieces: list[str] = []

        def take(text: str) -> None:
            pieces.append(text)
            say(printable(text))

        batch = PromptBatch([prompt], self.tokenizer).to(self.model.device)
        try:
            streamer = _Pieces(self.tokenizer, take)
            [row] = answers(self.model, batch, room, sampling, streamer=streamer, skip_special_tokens=False)
        except KeyboardInterrupt:
            return {"role": "assistant", "content": "".join(pieces)}
        return ChatTemplate.of(self.tokenizer).message_of(messages, str(row["prediction"]))


class _Pieces(TextStreamer):
    """Streams text as soon as it is final, without the prompt and control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass the text on."""
        if text:
            self.take(text)


def _load(name: str, chat_template: str | Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not Checkpoint.is_at(name):
        model = load_model(name) if name.endswith(".gguf") else load_exported(name)
        return model, load_tokenizer(name, chat_template)
    checkpoint = Checkpoint(name)
    model, tokenizer = restored(checkpoint.whole()), tokenizer_of(checkpoint.metadata)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return merge(model), tokenizer


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
