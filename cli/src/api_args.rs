//! How the API is run: what `up` and `api` take alike.

use anyhow::Context as _;
use tunesmith_api::{ApiConfig, IpNet, Prices, ProjectLimits};

/// Settings of the REST API.
#[derive(Debug, clap::Args)]
pub(crate) struct ApiArgs {
    /// A name that clients may use for a base model, as in gpt-4o-mini=SmolLM2-135M-Instruct
    #[arg(
        long = "model-alias",
        env = "TUNESMITH_MODEL_ALIASES",
        value_name = "ALIAS=MODEL",
        value_delimiter = ',',
        value_parser = alias
    )]
    model_aliases: Vec<(String, String)>,
    /// Addresses inside the network that webhooks may be sent to, as in 10.1.0.0/16
    #[arg(
        long = "webhook-range",
        env = "TUNESMITH_WEBHOOK_RANGES",
        value_name = "CIDR",
        value_delimiter = ','
    )]
    webhook_ranges: Vec<IpNet>,
    /// Web pages of this origin may call the API from a browser; * lets all
    #[arg(
        long = "cors-origin",
        env = "TUNESMITH_CORS_ORIGINS",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    cors_origins: Vec<String>,
    /// Requests a minute that a project may send, to all API processes on the database together
    #[arg(long, env = "TUNESMITH_REQUESTS_PER_MINUTE", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    requests_per_minute: Option<u32>,
    /// Jobs that a project may have at one time, ended ones not counted
    #[arg(long, env = "TUNESMITH_MAX_UNFINISHED_JOBS", value_name = "COUNT")]
    max_unfinished_jobs: Option<u64>,
    /// Bytes of files that a project may have at one time
    #[arg(long, env = "TUNESMITH_MAX_STORED_BYTES", value_name = "BYTES")]
    max_stored_bytes: Option<u64>,
    #[command(flatten)]
    prices: PriceArgs,
}

/// What a job costs, for `jobs preview`.
#[derive(Debug, Clone, clap::Args)]
struct PriceArgs {
    /// What an hour of a GPU costs
    #[arg(long, env = "TUNESMITH_PRICE_PER_GPU_HOUR", value_name = "PRICE", value_parser = price)]
    price_per_gpu_hour: Option<f64>,
    /// What a million tokens seen in training cost; it comes before the price of an hour
    #[arg(
        long,
        env = "TUNESMITH_PRICE_PER_MILLION_TOKENS",
        value_name = "PRICE",
        value_parser = price
    )]
    price_per_million_tokens: Option<f64>,
    /// What prices are in
    #[arg(long, env = "TUNESMITH_PRICE_CURRENCY", value_name = "CODE", default_value = "USD")]
    price_currency: String,
}

fn price(text: &str) -> Result<f64, String> {
    let price = text.parse().ok().filter(|price: &f64| price.is_finite() && *price >= 0.0);
    price.ok_or_else(|| "it must be a number of at least 0".to_owned())
}

impl PriceArgs {
    /// As the API takes them.
    fn prices(&self) -> Prices {
        Prices {
            per_gpu_hour: self.price_per_gpu_hour,
            per_million_tokens: self.price_per_million_tokens,
            currency: self.price_currency.clone(),
        }
    }
}

impl ApiArgs {
    /// The API on `listen` with these settings.
    pub(crate) fn config(self, listen: &str) -> ApiConfig {
        ApiConfig {
            webhook_ranges: self.webhook_ranges,
            model_aliases: self.model_aliases.into_iter().collect(),
            cors_origins: self.cors_origins,
            limits: ProjectLimits {
                requests_per_minute: self.requests_per_minute,
                unfinished_jobs: self.max_unfinished_jobs,
                stored_bytes: self.max_stored_bytes,
            },
            prices: self.prices.prices(),
            ..ApiConfig::new(listen)
        }
    }
}

fn alias(text: &str) -> anyhow::Result<(String, String)> {
    let (alias, model) = text.split_once('=').context("it must be ALIAS=MODEL")?;
    let (alias, model) = (alias.trim(), model.trim());
    anyhow::ensure!(!alias.is_empty() && !model.is_empty(), "it must be ALIAS=MODEL");
    Ok((alias.to_owned(), model.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Program {
        #[command(flatten)]
        api: ApiArgs,
    }

    #[test]
    fn settings_reach_the_api() {
        let program = Program::parse_from([
            "x",
            "--model-alias",
            "gpt-4o=a,gpt-4o-mini=b",
            "--webhook-range",
            "10.0.0.0/8,::1/128",
            "--cors-origin",
            "*",
            "--requests-per-minute",
            "5",
        ]);
        let config = program.api.config("h:1");
        assert_eq!(config.listen, "h:1");
        assert_eq!(config.model_aliases["gpt-4o-mini"], "b");
        assert_eq!(config.webhook_ranges.len(), 2);
        assert_eq!(config.limits.requests_per_minute, Some(5));
        assert_eq!(config.limits.unfinished_jobs, None);
    }

    #[test]
    fn a_setting_that_cannot_be_meant_is_refused() {
        for arguments in [
            ["x", "--model-alias", "gpt-4o"],
            ["x", "--model-alias", "=a"],
            ["x", "--webhook-range", "10.0.0.0/99"],
            ["x", "--requests-per-minute", "0"],
        ] {
            assert!(Program::try_parse_from(arguments).is_err(), "{arguments:?}");
        }
    }
}
