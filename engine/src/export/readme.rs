//! README.md beside the weights: the job's facts, and how to open them.

use std::fmt::Write as _;

use tunesmith_core::hyperparameters::{
    AdapterType, InitLoraWeights, Method, PreferenceLoss, Quantization,
};

use super::JobFacts;

/// The text of README.md.
pub(super) fn readme(facts: &JobFacts<'_>) -> String {
    let JobFacts { job, spec, step, total_steps, trained_tokens, initial_valid_loss, best } = facts;
    let hyperparameters = &spec.hyperparameters;
    let adapter = &hyperparameters.adapter;
    let mut text = format!("# {} fine-tuned by tunesmith\n\n| | |\n|---|---|\n", spec.model);
    let mut row = |name: &str, value: &dyn std::fmt::Display| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {name} | {value} |");
    };
    row("job", job);
    row("base model", &spec.model);
    if let Some(start) = &spec.start_from {
        row("started from", start);
    }
    row("step", &format_args!("{step} of {total_steps}"));
    row("trained tokens", trained_tokens);
    match adapter.kind {
        AdapterType::Lora => row(
            "method",
            &format_args!(
                "{}, r {}, alpha {}, dropout {}{}{}{}, on {}{}",
                if adapter.use_dora { "DoRA" } else { "LoRA" },
                adapter.r,
                adapter.alpha,
                adapter.dropout,
                if adapter.use_rslora { ", rank-stabilised" } else { "" },
                match adapter.init_lora_weights {
                    InitLoraWeights::Default => "",
                    InitLoraWeights::Pissa => {
                        ", started as the principal part of the weights (PiSSA), and here converted \
                         to a LoRA of twice the rank on the original base model"
                    }
                },
                match adapter.loraplus_lr_ratio {
                    1.0 => String::new(),
                    ratio => format!(", B at {ratio} times the learning rate (LoRA+)"),
                },
                adapter.target_modules.join(", "),
                match adapter.trainable_layers {
                    0 => String::new(),
                    last => format!(" of the last {last} layers"),
                },
            ),
        ),
        AdapterType::Full if adapter.trainable_layers == 0 => row("method", &"full fine-tuning"),
        AdapterType::Full => row(
            "method",
            &format_args!(
                "full fine-tuning of the last {} layers and the final norm",
                adapter.trainable_layers
            ),
        ),
    }
    if hyperparameters.method == Method::Dpo {
        let beta = hyperparameters.beta;
        match hyperparameters.preference_loss {
            PreferenceLoss::Dpo => row("preference loss", &format_args!("DPO, beta {beta}")),
            PreferenceLoss::Orpo => row("preference loss", &format_args!("ORPO, beta {beta}")),
            PreferenceLoss::Simpo => row(
                "preference loss",
                &format_args!("SimPO, beta {beta}, gamma {}", hyperparameters.simpo_gamma),
            ),
        }
    }
    match adapter.quantization {
        Quantization::None => {}
        Quantization::Int8 => row("frozen weights in training", &"blocks of 64 in 8 bits (int8)"),
        Quantization::Nf4 => row("frozen weights in training", &"blocks of 64 in 4 bits (NF4)"),
    }
    row("seed", &spec.seed);
    row("n_epochs", &hyperparameters.n_epochs);
    row("batch_size", &hyperparameters.batch_size);
    row("gradient_accumulation_steps", &hyperparameters.gradient_accumulation_steps);
    row("learning_rate", &hyperparameters.learning_rate);
    row("prompt_loss_weight", &hyperparameters.prompt_loss_weight);
    if let Some(loss) = initial_valid_loss {
        row("validation loss before training", &format_args!("{loss:.4}"));
    }
    if let Some(best) = best {
        row(
            "lowest validation loss so far",
            &format_args!("{:.4} after step {}", best.valid_loss, best.step),
        );
    }
    let snippet = match adapter.kind {
        AdapterType::Lora => {
            "from peft import PeftModel\n\
             from transformers import AutoModelForCausalLM\n\
             model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"BASE\"), \".\")\n"
        }
        AdapterType::Full => {
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\
             model = AutoModelForCausalLM.from_pretrained(\".\")\n\
             tokenizer = AutoTokenizer.from_pretrained(\".\")\n"
        }
    };
    let place = match adapter.kind {
        AdapterType::Lora if spec.base_is_tuned => {
            "In this directory, with BASE as the directory of the base model"
        }
        AdapterType::Lora => "In this directory, with BASE as the base model's directory or hub id",
        AdapterType::Full => "In this directory",
    };
    let _ = write!(text, "\n{place}:\n\n```python\n{snippet}```\n");
    if adapter.kind == AdapterType::Lora && spec.base_is_tuned {
        let _ = write!(
            text,
            "\nThe base model, `{base}`, was itself tuned here, in every weight: `tunesmith models \
             weights {base} --format merged` gives it. On the model that it was tuned from, this \
             adapter says something else. Asked for as `merged` or `gguf`, it comes with the weights \
             that it goes on.\n",
            base = spec.model
        );
    }
    if adapter.quantization != Quantization::None {
        text.push_str(
            "\nThe adapter learned beside quantised weights. It goes on the original base model, and \
             that is what it is merged into where merged weights are asked for; what it then says \
             differs a little from what was measured in training.",
        );
        if adapter.quantization == Quantization::Nf4 {
            text.push_str(
                " For the very weights of training, load the base model with \
                 `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=\"nf4\", \
                 bnb_4bit_compute_dtype=torch.float32)`.",
            );
        }
        text.push('\n');
    }
    text
}
