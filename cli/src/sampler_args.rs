//! How a sampler is run: what `up` and `sampler` take alike.

use crate::parts::{CacheArgs, own_command};
use std::path::PathBuf;
use tunesmith_sampler::{
    DEFAULT_CACHE_BYTES, DEFAULT_MAX_ADAPTERS, DEFAULT_MAX_BATCH, DEFAULT_MAX_MODELS,
    DEFAULT_MAX_ORDERS, SamplerConfig,
};

/// Bounds of a sampler.
#[derive(Debug, clap::Args)]
pub(crate) struct SamplerArgs {
    /// Models in memory at a time; adapters on one base model count as one
    #[arg(long, env = "TUNESMITH_MAX_MODELS", value_name = "COUNT", default_value_t = DEFAULT_MAX_MODELS, value_parser = at_least_one)]
    max_models: usize,
    /// Adapters in memory at a time for each base model
    #[arg(long, env = "TUNESMITH_MAX_ADAPTERS", value_name = "COUNT", default_value_t = DEFAULT_MAX_ADAPTERS, value_parser = at_least_one)]
    max_adapters: usize,
    /// Answers that a model computes side by side
    #[arg(long, env = "TUNESMITH_MAX_BATCH", value_name = "COUNT", default_value_t = DEFAULT_MAX_BATCH, value_parser = at_least_one)]
    max_batch: usize,
    /// Requests that a sampler takes at a time, waiting ones included; one more is refused
    #[arg(long, env = "TUNESMITH_MAX_REQUESTS", value_name = "COUNT", default_value_t = DEFAULT_MAX_ORDERS, value_parser = at_least_one)]
    max_requests: usize,
    /// Memory for the keys and values of each model, in mebibytes
    #[arg(long, env = "TUNESMITH_CACHE_MEMORY", value_name = "MIB", default_value_t = DEFAULT_CACHE_BYTES >> 20, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    cache_memory: u64,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| *count >= 1);
    count.ok_or_else(|| "it must be a whole number of at least 1".to_owned())
}

impl SamplerArgs {
    /// A sampler whose child is this program's own `sample`.
    ///
    /// # Errors
    /// When this program's own path cannot be found.
    pub(crate) fn config(
        &self,
        listen: &str,
        cache_dir: PathBuf,
        cache: CacheArgs,
        work_dir: PathBuf,
        device: &str,
    ) -> anyhow::Result<SamplerConfig> {
        // Of several GPUs a model answers on the first.
        let device = device.split(',').next().unwrap_or(device).trim();
        let mut config =
            SamplerConfig::new(listen, cache_dir, work_dir, device, own_command("sample")?);
        config.tuned_cache_bytes = cache.tuned_cache_bytes();
        config.max_models = self.max_models;
        config.max_adapters = self.max_adapters;
        config.max_batch = self.max_batch;
        config.max_orders = self.max_requests;
        config.cache_bytes = self.cache_memory << 20;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parts;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Program {
        #[command(flatten)]
        sampler: SamplerArgs,
        #[command(flatten)]
        cache: CacheArgs,
    }

    #[test]
    fn settings_reach_the_sampler_and_its_child_is_this_program() {
        let told = ["x", "--max-models", "3", "--cache-memory", "5", "--tuned-cache", "7"];
        let Program { sampler, cache } = Program::parse_from(told);
        let config = sampler.config("h:1", "c".into(), cache, "w".into(), "cuda:1,cuda:0");
        let config = config.expect("a program");
        assert_eq!((config.max_models, config.max_adapters), (3, 32));
        assert_eq!((config.cache_bytes, config.device.as_str()), (5 << 20, "cuda:1"));
        assert_eq!(config.tuned_cache_bytes, 7 << 30);
        assert_eq!(config.child.args, ["sample"]);
        let worker = parts::worker_config("c".into(), cache, "w".into(), "cpu").expect("a program");
        assert_eq!(worker.tuned_cache_bytes, 7 << 30);
        assert!(Program::try_parse_from(["x", "--max-batch", "0"]).is_err());
    }
}
