"""Hugging Face's Trainer: the class and its arguments in place of ``optim="adamw_torch"``."""

import torch
import transformers
from sklearn.datasets import load_digits

import optimzoo

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
data = [dict(pixel_values=image, labels=label) for image, label in zip(images, digits.target.tolist(), strict=True)]

transformers.set_seed(0)
config = transformers.ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
trainer = transformers.Trainer(
    model=transformers.ViTForImageClassification(config),
    args=transformers.TrainingArguments(
        output_dir="digits-vit",
        num_train_epochs=20,
        per_device_train_batch_size=32,
        learning_rate=1e-2,  # of the schedule; the class gets it as `lr` below
        lr_scheduler_type="cosine",
        warmup_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=data[:1500],
    eval_dataset=data[1500:],
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
    optimizer_cls_and_kwargs=(optimzoo.AdaBelief, dict(lr=1e-2, weight_decay=0.01)),
)
trainer.train()
accuracy = trainer.evaluate()["eval_accuracy"]
print(f"test accuracy {accuracy:.1%}")
