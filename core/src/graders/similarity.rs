//! Similarities of two texts, each between 0 and 1, each from its published formula.

use std::collections::HashMap;
use std::hash::Hash;

/// The longest texts whose common subsequence is looked for, in characters or words; the time
/// grows with the product of the two.
const MAX_SEQUENCE: usize = 20_000;
/// BLEU's and GLEU's longest n-grams.
const MAX_ORDER: usize = 4;

/// A similarity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Metric {
    /// 1 − d/(m + n), d being the least number of insertions and deletions that turn one text
    /// into the other, m and n their lengths in characters: rapidfuzz's `fuzz.ratio`.
    FuzzyMatch,
    /// BLEU-4 of one sentence against one reference, not smoothed (Papineni et al. 2002), on words
    /// between spaces.
    Bleu,
    /// The smaller one of precision and recall over all 1- to 4-grams (Wu et al. 2016), on words
    /// between spaces.
    Gleu,
    /// F1 of the n-grams in common (ROUGE-N, Lin 2004), on lower-case runs of a–z and 0–9.
    Rouge(usize),
    /// F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), on the same words.
    RougeL,
}

/// Their words.
pub(super) const METRICS: [(&str, Metric); 9] = [
    ("fuzzy_match", Metric::FuzzyMatch),
    ("bleu", Metric::Bleu),
    ("gleu", Metric::Gleu),
    ("rouge_1", Metric::Rouge(1)),
    ("rouge_2", Metric::Rouge(2)),
    ("rouge_3", Metric::Rouge(3)),
    ("rouge_4", Metric::Rouge(4)),
    ("rouge_5", Metric::Rouge(5)),
    ("rouge_l", Metric::RougeL),
];

/// OpenAI's metrics that are not computed here, and why.
pub(super) const REFUSED: [(&str, &str); 2] = [
    ("cosine", "compares vectors of an embedding model, and this server has none"),
    ("meteor", "needs a dictionary of synonyms and stems, and this server has none"),
];

impl Metric {
    /// How similar `input` is to `reference`; none if they are too long to be compared.
    pub(super) fn score(self, input: &str, reference: &str) -> Option<f64> {
        match self {
            Self::FuzzyMatch => {
                let (a, b): (Vec<char>, Vec<char>) =
                    (input.chars().collect(), reference.chars().collect());
                let total = a.len() + b.len();
                if total == 0 {
                    return Some(1.0);
                }
                let common = common_subsequence(&a, &b)?;
                let distance = (total - 2 * common) as f64;
                Some(1.0 - distance / total as f64)
            }
            Self::Bleu => Some(bleu(&words(input), &words(reference))),
            Self::Gleu => Some(gleu(&words(input), &words(reference))),
            Self::Rouge(order) => {
                let (a, b) = (rouge_words(input), rouge_words(reference));
                let (a, b) = (ngrams(&a, order), ngrams(&b, order));
                Some(f1(matches(&a, &b), count(&a), count(&b)))
            }
            Self::RougeL => {
                let (a, b) = (rouge_words(input), rouge_words(reference));
                Some(f1(common_subsequence(&a, &b)?, a.len(), b.len()))
            }
        }
    }
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

fn rouge_words(text: &str) -> Vec<String> {
    text.to_lowercase()
        .split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()))
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// How often each run of `order` words occurs.
fn ngrams<T: Eq + Hash>(words: &[T], order: usize) -> HashMap<&[T], usize> {
    let mut counts = HashMap::new();
    for ngram in words.windows(order) {
        *counts.entry(ngram).or_default() += 1;
    }
    counts
}

fn count<T>(ngrams: &HashMap<&[T], usize>) -> usize {
    ngrams.values().sum()
}

/// How many n-grams of one are n-grams of the other, each counted as often as both have it.
fn matches<T: Eq + Hash>(a: &HashMap<&[T], usize>, b: &HashMap<&[T], usize>) -> usize {
    a.iter().map(|(ngram, count)| (*count).min(b.get(ngram).copied().unwrap_or(0))).sum()
}

/// The harmonic mean of precision and recall.
fn f1(matches: usize, found: usize, wanted: usize) -> f64 {
    if matches == 0 {
        return 0.0;
    }
    let (precision, recall) = (matches as f64 / found as f64, matches as f64 / wanted as f64);
    2.0 * precision * recall / (precision + recall)
}

/// The geometric mean of the n-gram precisions, times the penalty for an answer that is too short.
fn bleu(input: &[&str], reference: &[&str]) -> f64 {
    let mut log_sum = 0.0;
    for order in 1..=MAX_ORDER {
        let (a, b) = (ngrams(input, order), ngrams(reference, order));
        let hits = matches(&a, &b);
        if hits == 0 {
            return 0.0;
        }
        log_sum += (hits as f64 / count(&a) as f64).ln();
    }
    let (length, wanted) = (input.len() as f64, reference.len() as f64);
    let brevity = if length > wanted { 1.0 } else { (1.0 - wanted / length).exp() };
    brevity * (log_sum / MAX_ORDER as f64).exp()
}

fn gleu(input: &[&str], reference: &[&str]) -> f64 {
    let (mut hits, mut found, mut wanted) = (0, 0, 0);
    for order in 1..=MAX_ORDER {
        let (a, b) = (ngrams(input, order), ngrams(reference, order));
        hits += matches(&a, &b);
        found += count(&a);
        wanted += count(&b);
    }
    match found.max(wanted) {
        0 => 0.0,
        all => hits as f64 / all as f64,
    }
}

/// The length of the longest common subsequence, row by row; none if a sequence is too long.
fn common_subsequence<T: PartialEq>(a: &[T], b: &[T]) -> Option<usize> {
    if a.len().max(b.len()) > MAX_SEQUENCE {
        return None;
    }
    let mut row = vec![0_usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (column, y) in b.iter().enumerate() {
            let above = row[column + 1];
            row[column + 1] = if x == y { diagonal + 1 } else { above.max(row[column]) };
            diagonal = above;
        }
    }
    Some(row[b.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_too_long_to_compare_have_no_score() {
        let long = "x".repeat(MAX_SEQUENCE + 1);
        assert_eq!(Metric::FuzzyMatch.score(&long, "x"), None);
        assert_eq!(Metric::Rouge(1).score(&long, "x"), Some(0.0));
    }

    #[test]
    fn empty_texts_have_a_score() {
        for (name, metric) in METRICS {
            let expected = if name == "fuzzy_match" { 1.0 } else { 0.0 };
            assert_eq!(metric.score("", ""), Some(expected), "{name}");
            assert_eq!(metric.score("", "a b"), Some(0.0), "{name}");
            assert_eq!(metric.score("a b", ""), Some(0.0), "{name}");
        }
    }

    /// rapidfuzz, nltk and rouge-score, by tests/reference/graders.py.
    #[test]
    fn scores_are_those_of_the_reference_implementations() {
        let reference: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/reference/graders.json")).expect("JSON");
        let cases = reference["cases"].as_array().expect("cases");
        assert!(cases.len() >= 12, "{}", cases.len());
        for case in cases {
            let text = |name: &str| case[name].as_str().expect("text");
            for (name, metric) in METRICS {
                let score = metric.score(text("input"), text("reference")).expect("short");
                let expected = case["scores"][name].as_f64().expect("number");
                assert!((score - expected).abs() < 1e-12, "{name} {case}: {score}");
            }
        }
    }
}
