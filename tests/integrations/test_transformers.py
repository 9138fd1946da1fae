"""Hugging Face's Trainer, with an optimizer and with a class and its arguments."""

from __future__ import annotations

import pytest
import torch
import transformers
from steps import bits
from torch.optim.lr_scheduler import LambdaLR

import optimzoo

CLASSES = {
    "DiffGrad": optimzoo.DiffGrad,
    "AdaBelief": optimzoo.AdaBelief,
    "AdaGradNorm": optimzoo.AdaGradNorm,
    "DaleAdamW": optimzoo.DaleAdamW,
}
DRAW = torch.Generator().manual_seed(0)
DATA = [dict(input_ids=torch.randint(30, (5,), generator=DRAW), labels=i % 2) for i in range(16)]


def model():
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    torch.manual_seed(1)
    return transformers.BertForSequenceClassification(config)


def trainer(way, name, folder, steps):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=4,
        learning_rate=3e-3,
        weight_decay=0.01,
        warmup_steps=2,  # from a rate of zero
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    net, cls = model(), CLASSES[name]
    options = dict(zeros="floor", min_abs=1e-6) if name == "DaleAdamW" else {}  # the row of the padding is zero
    if way == "class":
        given = dict(optimizer_cls_and_kwargs=(cls, dict(lr=3e-3, **options)))
    else:
        params = optimzoo.dale_groups(net, lr=1e-3) if name == "DaleAdamW" else net.parameters()
        optimizer = cls(params, lr=3e-3, **options)
        given = dict(optimizers=(optimizer, LambdaLR(optimizer, lambda step: min(step, 2) / 2)))
    return transformers.Trainer(net, arguments, train_dataset=DATA, **given)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("way", ["optimizers", "class"])
def test_trainer_resumes_from_its_checkpoint(way, name, tmp_path):
    first = trainer(way, name, tmp_path, 8)
    first.train()
    second = trainer(way, name, tmp_path, 8)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert type(getattr(first.optimizer, "optimizer", first.optimizer)) is CLASSES[name]
    assert second.state.global_step == 8
    assert bits(first.model.state_dict()) != bits(model().state_dict())
    assert bits(first.model.state_dict()) == bits(second.model.state_dict())
    assert bits(first.optimizer.state_dict()) == bits(second.optimizer.state_dict())
