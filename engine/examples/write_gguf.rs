//! Writes a Hugging Face directory as a GGUF in half precision, as the front-end gives it away:
//! `write_gguf MODEL_DIR FILE`.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use safetensors::tensor::{SafeTensors, TensorView};
use tunesmith_core::gguf::{ModelFiles, Plan, Source, StorageType};
use tunesmith_core::weights::FloatType;

fn values(tensor: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let name = tensor.dtype().to_string();
    let float = FloatType::parse(&name).ok_or_else(|| format!("{name} is no type of floats"))?;
    Ok(float.decode(tensor.data()))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model_dir, target] = arguments.as_slice() else {
        return Err("usage: write_gguf MODEL_DIR FILE".into());
    };
    let dir = Path::new(model_dir);
    let [config, tokenizer, tokenizer_config, weights] =
        ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
            .map(|name| fs::read(dir.join(name)));
    let (config, tokenizer, tokenizer_config) = (config?, tokenizer?, tokenizer_config?);
    let files = ModelFiles {
        config: &config,
        tokenizer: &tokenizer,
        tokenizer_config: &tokenizer_config,
        chat_template: None,
        generation_config: None,
    };
    let weights = weights?;
    let tensors = SafeTensors::deserialize(&weights)?;
    let all = tensors.tensors();
    let shapes = all.iter().map(|(name, tensor)| (name.as_str(), tensor.shape()));
    let plan = Plan::new("bench", &files, shapes, StorageType::F16)?;

    let mut file = BufWriter::new(File::create(target)?);
    file.write_all(&plan.head)?;
    for planned in &plan.tensors {
        let values = match &planned.source {
            Source::Weight(name) => values(&tensors.tensor(name)?)?,
            Source::Values(values) => values.clone(),
        };
        for rows in planned.pieces() {
            let columns = planned.columns();
            let piece = values[rows.start * columns..rows.end * columns].to_vec();
            file.write_all(&planned.encode(piece)?)?;
        }
        file.write_all(&vec![0; planned.padding()])?;
    }
    Ok(file.flush()?)
}
