//! Turns a base model into a Hugging Face directory: `import_model SOURCE OUT_DIR`.
//!
//! Makes the test models; users have `tunesmith models import`.

use std::path::Path;
use std::process::ExitCode;

use tunesmith_engine::import::import_source;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, out_dir] = arguments.as_slice() else {
        eprintln!("usage: import_model SOURCE OUT_DIR");
        return ExitCode::FAILURE;
    };
    match import_source(Path::new(source), Path::new(out_dir)) {
        Ok(model) => {
            println!("{}: {} tokens of context, {}", model.name, model.context_length, {
                model.files.join(" ")
            });
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
