from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
reference = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

args = DPOConfig(
    output_dir="dpo",
    beta=0.1,
    loss_type=["sigmoid", "bco_pair", "sft"],
    loss_weights=[0.8, 0.2, 1.0],
    max_length=1024,
    truncation_mode="keep_start",
    precompute_ref_log_probs=False,
    disable_dropout=True,
    max_steps=2,
    per_device_train_batch_size=4,
    logging_steps=1,
    report_to="none",
)
trainer = DPOTrainer(
    model=model, ref_model=reference, args=args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
)
trainer.train()
metrics = trainer.evaluate()
