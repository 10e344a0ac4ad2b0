from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
dataset = load_dataset("trl-lib/kto-mix-14k", split="train")

args = KTOConfig(
    output_dir="kto",
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.33,
    train_sampling_strategy="sequential",
    max_steps=2,
    per_device_train_batch_size=4,
    logging_steps=1,
    report_to="none",
)
trainer = KTOTrainer(model, None, args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer)
trainer.train()
metrics = trainer.evaluate()
