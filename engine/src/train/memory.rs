//! How a run fits into memory: the size of a pass, and whether layers are computed again.

use std::cell::LazyCell;
use std::fs;
use std::path::Path;

use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::{AdapterType, Quantization, ResolvedHyperparameters};
use tunesmith_core::memory::{MemoryEstimate, PassSize, Size};

use super::pass_sizes::LargestPasses;
use crate::error::EngineError;
use crate::models::config::ModelConfig;

/// Share of the free memory that a run may be planned to take: estimates err, and others live here.
const USABLE: f64 = 0.9;
/// Passes below this many tokens waste more time than the memory is worth.
const MIN_TOKENS_PER_PASS: usize = 256;

/// What was decided before the run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    /// The most tokens of one pass, where more than one row shares it.
    pub(super) tokens_per_pass: usize,
    /// Whether the backward pass computes each layer again.
    pub(super) recompute: bool,
    /// What it is then expected to take.
    pub(super) estimate: MemoryEstimate,
}

/// What a plan is made for.
#[derive(Debug)]
pub(super) struct Planner<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) hyperparameters: &'a ResolvedHyperparameters,
    /// Passes that run at a time.
    pub(super) replicas: usize,
    /// Bytes that are free; None where nobody can tell.
    pub(super) available: Option<u64>,
}

impl Planner<'_> {
    /// The largest passes of at most `tokens_per_pass` tokens that fit, and rather smaller ones
    /// than layers that are computed again. The size of a pass decides how sums are rounded, so a
    /// run that goes on keeps the one that it began with: `fixed`. `largest` tells what passes a
    /// limit gives.
    ///
    /// # Errors
    /// `out_of_memory` with the numbers, when not even the longest row fits by itself.
    pub(super) fn plan(
        &self,
        tokens_per_pass: usize,
        longest_row: usize,
        fixed: Option<usize>,
        largest: impl Fn(usize) -> LargestPasses,
    ) -> Result<Plan, EngineError> {
        let sizes: Vec<usize> = match fixed {
            Some(tokens) => vec![tokens],
            None => std::iter::successors(Some(tokens_per_pass), |tokens| Some(tokens / 2))
                .take_while(|&tokens| tokens >= MIN_TOKENS_PER_PASS.min(tokens_per_pass).max(1))
                .collect(),
        };
        // Each is counted once, and only when it comes to it.
        let counted = |&tokens: &usize| {
            let largest = &largest;
            (tokens, LazyCell::new(move || largest(tokens)))
        };
        let sizes: Vec<_> = sizes.iter().map(counted).collect();
        let mut least = None;
        for recompute in [false, true] {
            for (tokens_per_pass, largest) in &sizes {
                let (tokens_per_pass, largest) = (*tokens_per_pass, **largest);
                let estimate = self.estimate(largest, recompute);
                if self.fits(&estimate) {
                    return Ok(Plan { tokens_per_pass, recompute, estimate });
                }
                least = Some(estimate);
            }
        }
        match least {
            Some(estimate) => Err(self.refusal(&estimate, longest_row)),
            None => Err(EngineError::Data("a pass needs room for a token".to_owned())),
        }
    }

    /// Whether the weights and what belongs to them may be loaded at all.
    ///
    /// # Errors
    /// As [`Planner::plan`].
    pub(super) fn check_weights(&self) -> Result<(), EngineError> {
        let estimate = self.estimate(LargestPasses { trained: 1, measured: 1 }, true);
        if self.fits(&estimate) { Ok(()) } else { Err(self.refusal(&estimate, 1)) }
    }

    fn estimate(&self, largest: LargestPasses, recompute: bool) -> MemoryEstimate {
        let several = self.hyperparameters.gradient_accumulation_steps > 1
            || self.hyperparameters.batch_size > 1;
        let pass = PassSize {
            tokens: (largest.trained * self.replicas) as u64,
            measured_tokens: largest.measured as u64,
            several,
            recompute,
        };
        MemoryEstimate::new(&self.config.size(), self.hyperparameters, pass)
    }

    fn fits(&self, estimate: &MemoryEstimate) -> bool {
        self.available.is_none_or(|available| estimate.total() <= usable(available))
    }

    fn refusal(&self, estimate: &MemoryEstimate, longest_row: usize) -> EngineError {
        let adapter = &self.hyperparameters.adapter;
        let smaller = match adapter.kind {
            AdapterType::Full => "train a LoRA adapter (adapter.type \"lora\"), ",
            AdapterType::Lora if adapter.quantization == Quantization::None => {
                "keep the frozen weights in fewer bits (adapter.quantization \"nf4\"), "
            }
            AdapterType::Lora => "",
        };
        EngineError::Input(ApiError::new(
            ErrorCode::OutOfMemory,
            format!(
                "The job needs about {estimate} for rows of up to {longest_row} tokens, and the \
                 worker has {} free, of which {:.0} % may be planned for. Lower max_seq_length, \
                 {smaller}choose a smaller base model, or run a worker with more memory.",
                Size(self.available.unwrap_or_default()),
                USABLE * 100.0,
            ),
        ))
    }
}

/// What of `available` bytes may be planned for.
pub(crate) fn usable(available: u64) -> u64 {
    (available as f64 * USABLE) as u64
}

/// Bytes that this process may still take: what the machine has available, or what is left of the
/// limit of its control group, or of one above. None where the system does not say.
pub(crate) fn available() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_of(&text));
    let group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        left_of_groups(Path::new("/sys/fs/cgroup"), Path::new(path))
    });
    [machine, group].into_iter().flatten().min()
}

/// The least that is left of the limits of a control group below `root` and of those above it.
fn left_of_groups(root: &Path, group: &Path) -> Option<u64> {
    let left = |dir: &Path| {
        let read = |file: &str| fs::read_to_string(root.join(dir).join(file)).ok();
        let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
        // Pages of files that nobody has read lately go when others are asked for; they are counted
        // as used, and a worker has just written a model's files.
        let files = read("memory.stat").and_then(|stat| {
            stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok())
        });
        let used = number("memory.current")?.saturating_sub(files.unwrap_or(0));
        Some(number("memory.max")?.saturating_sub(used))
    };
    group.ancestors().filter_map(left).min()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use tunesmith_core::hyperparameters::{AdapterConfig, DataFacts, Hyperparameters};

    use super::*;

    fn config() -> ModelConfig {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 8,
            "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        ModelConfig::parse(&json.to_string()).unwrap()
    }

    fn hyperparameters(adapter: AdapterConfig) -> ResolvedHyperparameters {
        let facts = DataFacts { examples: 100, context_length: 2048 };
        ResolvedHyperparameters { adapter, ..Hyperparameters::default().resolve(&facts) }
    }

    /// What `ask` finds out from a planner of the tiny model.
    fn planned<T>(
        adapter: AdapterConfig,
        available: Option<u64>,
        ask: impl FnOnce(Planner<'_>) -> T,
    ) -> T {
        ask(Planner {
            config: &config(),
            hyperparameters: &hyperparameters(adapter),
            replicas: 1,
            available,
        })
    }

    /// Rows of up to 300 tokens, of which some fill any pass.
    fn plan(available: Option<u64>, fixed: Option<usize>) -> Result<Plan, EngineError> {
        plan_for(available, fixed, |tokens| tokens.max(300))
    }

    fn plan_for(
        available: Option<u64>,
        fixed: Option<usize>,
        trained: fn(usize) -> usize,
    ) -> Result<Plan, EngineError> {
        let largest = |tokens| LargestPasses { trained: trained(tokens), measured: 0 };
        planned(AdapterConfig::default(), available, |planner| {
            planner.plan(2048, 300, fixed, largest)
        })
    }

    /// The bytes that a pass of so many tokens needs.
    fn needed(tokens: usize, recompute: bool) -> Option<u64> {
        let largest = LargestPasses { trained: tokens, measured: 0 };
        let estimate =
            planned(AdapterConfig::default(), None, |planner| planner.estimate(largest, recompute));
        Some((estimate.total() as f64 / USABLE) as u64 + 1)
    }

    #[test]
    fn with_room_passes_are_as_large_as_they_may_be() {
        for available in [None, Some(1 << 40), needed(2048, false)] {
            let plan = plan(available, None).unwrap();
            assert_eq!((plan.tokens_per_pass, plan.recompute), (2048, false));
        }
    }

    #[test]
    fn less_room_makes_passes_smaller_and_then_layers_are_computed_again() {
        let chosen = |available| {
            let plan = plan(available, None).unwrap();
            (plan.tokens_per_pass, plan.recompute)
        };
        assert_eq!(chosen(needed(1024, false)), (1024, false));
        // Below the longest row a pass is that row alone.
        assert_eq!(chosen(needed(300, false)), (256, false));
        assert_eq!(chosen(needed(300, true)), (256, true));
    }

    #[test]
    fn rows_that_fill_no_pass_are_planned_by_what_they_have() {
        let room = needed(300, false);
        assert!(room < needed(2048, false));
        for fixed in [None, Some(2048)] {
            let plan = plan_for(room, fixed, |_| 300).unwrap();
            assert_eq!((plan.tokens_per_pass, plan.recompute), (2048, false));
        }
    }

    #[test]
    fn a_run_that_goes_on_keeps_its_passes() {
        assert_eq!(plan(None, Some(512)).unwrap().tokens_per_pass, 512);
        let tight = plan(needed(512, true), Some(512)).unwrap();
        assert_eq!((tight.tokens_per_pass, tight.recompute), (512, true));
    }

    #[test]
    fn a_job_that_cannot_fit_is_refused_with_the_numbers_and_the_way_out() {
        let error = plan(Some(70 << 20), None).unwrap_err().to_api_error();
        assert_eq!(error.code, ErrorCode::OutOfMemory);
        for words in ["weights 3 MiB", "up to 300 tokens", "70 MiB free", "max_seq_length"] {
            assert!(error.message.contains(words), "{}", error.message);
        }
        assert!(!error.message.contains("adapter.type"));
        let full =
            planned(AdapterConfig::full(), Some(70 << 20), |planner| planner.check_weights());
        assert!(full.unwrap_err().to_string().contains("adapter.type"));
    }

    #[test]
    fn a_groups_limit_counts_without_files_that_may_go_and_so_do_those_above() {
        let root = tempfile::tempdir().unwrap();
        let write = |dir: &str, file: &str, text: &str| {
            fs::create_dir_all(root.path().join(dir)).unwrap();
            fs::write(root.path().join(dir).join(file), text).unwrap();
        };
        let left = || left_of_groups(root.path(), Path::new("work/job"));
        assert_eq!(left(), None);
        write("work/job", "memory.max", "max\n");
        write("work/job", "memory.current", "700\n");
        assert_eq!(left(), None);
        write("work/job", "memory.max", "1000\n");
        assert_eq!(left(), Some(300));
        write("work/job", "memory.stat", "anon 100\nfile 600\ninactive_file 500\nslab 3\n");
        assert_eq!(left(), Some(800));
        write("work", "memory.max", "1500\n");
        write("work", "memory.current", "1400\n");
        assert_eq!(left(), Some(100));
    }

    #[test]
    fn the_systems_own_words_are_read() {
        let meminfo = "MemTotal:       24000000 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(available_of(meminfo), Some(1 << 20));
        assert_eq!(available_of("MemTotal: 5 kB\n"), None);
        assert!(available().is_some_and(|bytes| bytes > 0));
    }
}
