"""
CleanCLIP by LoRA: train small adapters in place of the weights, save them alone, load them again, and merge them. The
projections and `logit_scale` are trained in full, and saved with the adapters. Put in your own names.
"""

from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModel, CLIPModel

from hf_robust_clip import AttackSuccessEvaluator, BlendedTrigger, CleanCLIPTrainer, CleanCLIPTrainingArguments

MODEL = "openai/clip-vit-base-patch32"
TARGET = "banana"  # a class of the images
EPOCHS = 10
LEARNING_RATE = 1e-4  # adapters start from zero, and take a higher rate than the weights themselves

images = load_dataset("you/labeled-images", split="test")  # columns: image, label
attack = AttackSuccessEvaluator(images, BlendedTrigger(), TARGET, images.features["label"].names)
adapters = LoraConfig(
    r=16,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    modules_to_save=["visual_projection", "text_projection"],
)
trainer = CleanCLIPTrainer(
    MODEL,
    CleanCLIPTrainingArguments("lora", num_train_epochs=EPOCHS, learning_rate=LEARNING_RATE, report_to="none"),
    train_dataset=load_dataset("you/clean-pairs", split="train"),  # columns: image, caption
    evaluators=attack,
    peft_config=adapters,
)
print(f"before: {trainer.run_evaluators()}")
trainer.train()
trainer.save_model()
print(f"after: {trainer.run_evaluators()}")

# The folder names the model that the adapters belong to. transformers loads that first, and then the adapters.
loaded = AutoModel.from_pretrained("lora")
print(f"loaded: {attack(loaded, trainer.processing_class)}")

# The merged model needs neither PEFT nor the first model. `merge_adapters=True` saves it this way at once.
merged = PeftModel.from_pretrained(CLIPModel.from_pretrained(MODEL), "lora").merge_and_unload()
merged.save_pretrained("merged")
trainer.processing_class.save_pretrained("merged")
