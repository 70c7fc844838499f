//! docs/correctness.md names tests. Each of them is there.

use std::fs;
use std::path::{Path, PathBuf};

/// Rust and Python sources below `dir`, without what builds and installs leave there.
fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory of the repository") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if !name.starts_with('.') && !["target", "node_modules"].contains(&name) {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") || name.starts_with("test_") && name.ends_with(".py") {
            found.push(path);
        }
    }
}

/// The words in backticks in the last column of the page's tables.
fn named_tests(page: &str) -> Vec<&str> {
    page.lines()
        .filter(|line| line.starts_with('|'))
        .filter_map(|line| line.trim_end_matches(['|', ' ']).rsplit('|').next())
        .flat_map(|column| column.split('`').skip(1).step_by(2))
        .collect()
}

#[test]
fn every_test_that_the_correctness_page_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let page = fs::read_to_string(root.join("docs/correctness.md")).expect("the page");
    let mut files = Vec::new();
    sources(root, &mut files);
    let text: String =
        files.iter().map(|path| fs::read_to_string(path).expect("a source file")).collect();
    let named = named_tests(&page);
    assert!(named.len() > 50, "{named:?}");
    let missing: Vec<&str> = named
        .into_iter()
        .filter(|name| {
            !text.contains(&format!("fn {name}()")) && !text.contains(&format!("def {name}("))
        })
        .collect();
    assert!(missing.is_empty(), "docs/correctness.md names tests that are not there: {missing:?}");
}
