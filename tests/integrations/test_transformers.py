"""Hugging Face: Trainer, and models that keep the documents of a packed row apart."""

import math

import pytest
import torch
from integrations.text import DATA, SENTENCES, VOCABULARY, assert_epochs, documents_of
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import seqbatch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def llama(**options):
    """Return a random model of two small layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, **sizes, **ends, **options))


def gpt2(**options):
    """Return a random model of two small layers, without dropout."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    rest = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **rest, **options))


class PlanTrainer(Trainer):
    """The three lines that a user writes, and a record of what the model was given."""

    def __init__(self, loader, **options):
        super().__init__(**options)
        self.loader, self.seen = loader, []

    def get_train_dataloader(self):
        return self.loader

    def training_step(self, model, inputs, *rest):
        self.seen.append((int(self.state.epoch), documents_of(inputs)))
        return super().training_step(model, inputs, *rest)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        (seqbatch.Padding(16), "batch_first"),
        (seqbatch.Packing(400, rows=2), "batch_first"),
        (seqbatch.Packing(800), "flat"),
    ],
    ids=str,
)
def test_trainer(tmp_path, strategy, layout, accumulation):
    """Two epochs hold every sentence once each, and the loss falls."""
    settings = TrainingArguments(
        output_dir=tmp_path,
        num_train_epochs=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    loader = seqbatch.make_loader(DATA, strategy, as_dict=True, layout=layout)
    batches = len(loader)
    trainer = PlanTrainer(loader, model=llama(), args=settings)
    trainer.train()
    assert len(trainer.seen) == 2 * batches
    assert_epochs([[documents for epoch, documents in trainer.seen if epoch == number] for number in range(2)])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.xfail(raises=AssertionError, reason="Trainer counts the first epoch only: what is more later is left out")
def test_trainer_epochs_of_unequal_length(tmp_path):
    """Strategies whose epochs differ in batches: choose one whose epochs do not (Padding, Packing) for Trainer."""
    strategy = seqbatch.Bucketing(max_tokens=400)
    counts = [len(strategy.plan(DATA.lengths, epoch=epoch)) for epoch in range(2)]
    settings = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    loader = seqbatch.make_loader(DATA, strategy, as_dict=True)
    trainer = PlanTrainer(loader, model=llama(), args=settings)
    trainer.train()
    assert counts[0] < counts[1]
    assert_epochs([[documents for epoch, documents in trainer.seen if epoch == number] for number in range(2)])


@pytest.mark.parametrize("saved_at", [5, 20])
def test_trainer_resumes(tmp_path, saved_at):
    """Trainer's own way to go on from a checkpoint, which skips batches, meets the rest of them once."""
    settings = TrainingArguments(
        output_dir=tmp_path,
        num_train_epochs=2,
        save_steps=saved_at,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    first, second = (
        PlanTrainer(seqbatch.make_loader(DATA, seqbatch.Padding(16), as_dict=True), model=llama(), args=settings)
        for _ in range(2)
    )
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"))
    assert [documents for _, documents in second.seen] == [documents for _, documents in first.seen][saved_at:]
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["batch_first", "flat"])
@pytest.mark.parametrize("make_model", [llama, gpt2])
def test_packed_documents_are_alone(make_model, layout, attention):
    """A document has the scores, and a batch the loss and gradient, that its documents have alone."""
    model = make_model(attn_implementation=attention).train(layout == "flat")
    loader = seqbatch.make_loader(DATA, seqbatch.Packing(500, rows=2), as_dict=True, layout=layout)
    plain = seqbatch.make_loader(DATA, seqbatch.Packing(500, rows=2), layout=layout)
    for _, inputs, batch in zip(range(2), loader, plain, strict=False):
        assert "attention_mask" not in inputs
        result = model(**inputs)
        scores = result.logits[0] if layout == "flat" else result.logits
        loss, count = 0.0, 0
        for sequence, piece in zip(batch.placement.sequence, batch.unbatch(scores), strict=True):
            tokens = torch.tensor(list(SENTENCES[sequence]))[None]
            alone = model(input_ids=tokens, labels=tokens)
            torch.testing.assert_close(piece, alone.logits[0], atol=1e-5, rtol=0)
            loss, count = loss + alone.loss * (tokens.shape[1] - 1), count + tokens.shape[1] - 1
        torch.testing.assert_close(result.loss, loss / count)
        mine = torch.autograd.grad(result.loss, list(model.parameters()), retain_graph=True)
        expected = torch.autograd.grad(loss / count, list(model.parameters()))
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_packed_documents_leak_with_a_cache():
    """Why `use_cache` is among the inputs: with a cache, models do not look for documents in position_ids."""
    model = llama(attn_implementation="sdpa").eval()
    inputs = next(iter(seqbatch.make_loader(DATA, seqbatch.Packing(500, rows=2), as_dict=True)))
    apart, leaking = model(**inputs).logits, model(**inputs | {"use_cache": True}).logits
    assert (apart - leaking).abs().max() > 1e-3
