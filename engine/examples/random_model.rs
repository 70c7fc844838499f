//! Writes a Llama with random weights, for measuring: `random_model OUT_DIR SHAPE`.
//!
//! SHAPE is `8b` (the shape of Llama 3.1 8B) or `tiny`. The weights are bf16, uniform with a
//! standard deviation of 0.02, and norms are 1. There is no tokenizer.

use std::fs::{self, File};
use std::io::{BufWriter, Error, Write as _};
use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

struct Shape {
    vocabulary: usize,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    key_value_heads: usize,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (out_dir, shape) = match arguments.as_slice() {
        [out_dir, shape] if shape == "8b" => (
            out_dir,
            Shape {
                vocabulary: 128_256,
                hidden: 4096,
                inner: 14_336,
                layers: 32,
                heads: 32,
                key_value_heads: 8,
            },
        ),
        [out_dir, shape] if shape == "tiny" => (
            out_dir,
            Shape {
                vocabulary: 1000,
                hidden: 64,
                inner: 160,
                layers: 2,
                heads: 4,
                key_value_heads: 2,
            },
        ),
        _ => return Err("usage: random_model OUT_DIR 8b|tiny".into()),
    };
    write(Path::new(out_dir), &shape)?;
    Ok(())
}

fn write(dir: &Path, shape: &Shape) -> Result<(), Error> {
    fs::create_dir_all(dir)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.hidden / shape.heads, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    });
    fs::write(dir.join("config.json"), config.to_string())?;

    let tensors = tensors(shape);
    let mut header = Map::new();
    let mut end = 0;
    for (name, dims) in &tensors {
        let start = end;
        end += dims.iter().product::<usize>() * size_of::<bf16>();
        let entry = json!({"dtype": "BF16", "shape": dims, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = BufWriter::new(File::create(dir.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    // A tensor at a time: the whole model need not fit into memory.
    for (number, (_, dims)) in tensors.iter().enumerate() {
        let length = dims.iter().product();
        let values: Vec<u16> = match dims.len() {
            1 => vec![bf16::ONE.to_bits(); length],
            _ => (0..length).into_par_iter().map(|i| random(number as u64, i as u64)).collect(),
        };
        file.write_all(bytemuck::cast_slice(&values))?;
    }
    file.into_inner().map_err(|error| error.into_error())?.sync_all()
}

/// Names and shapes, as Hugging Face has them.
fn tensors(shape: &Shape) -> Vec<(String, Vec<usize>)> {
    let Shape { vocabulary, hidden, inner, .. } = *shape;
    let key_value = hidden / shape.heads * shape.key_value_heads;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden])];
    for layer in 0..shape.layers {
        let parts = [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![key_value, hidden]),
            ("self_attn.v_proj", vec![key_value, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ];
        let named = |(part, dims)| (format!("model.layers.{layer}.{part}.weight"), dims);
        tensors.extend(parts.map(named));
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    tensors.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden]));
    tensors
}

/// A weight as bf16's bits: a hash of its place (SplitMix64) as a uniform number.
fn random(tensor: u64, index: u64) -> u16 {
    let z = (tensor << 40 | index).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let uniform = ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5;
    // A uniform number in ±½ has a standard deviation of 1/√12.
    bf16::from_f32(uniform * 0.02 * 12f32.sqrt()).to_bits()
}
