//! `cargo xtask soak`: the fault tests at full length, then the fuzzers.

use std::fs;

use anyhow::{Context, Result};

use crate::shell;
use crate::workspace::{Package, Workspace};

/// Arguments of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One of the ten; all that exist without it.
    #[arg(value_name = "CRATE")]
    name: Option<String>,
    /// How long each fuzz target runs.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    fuzz_seconds: u32,
    /// Only the fuzz targets, or only the tests.
    #[arg(long)]
    only: Option<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Tests,
    Fuzz,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let workspace = Workspace::load()?;
    for package in workspace.chosen(arguments.name.as_deref())? {
        if arguments.only != Some(Part::Fuzz) {
            shell::run(
                shell::cargo()
                    .args(["test", "--release"])
                    .args(package.cargo_arguments())
                    .args(["--", "--nocapture"])
                    .env("CARLSBAD_SOAK", "1"),
            )?;
        }
        if arguments.only != Some(Part::Tests) {
            fuzz(package, arguments.fuzz_seconds)?;
        }
    }
    Ok(())
}

/// Runs each fuzz target of a crate for `seconds`.
pub(crate) fn fuzz(package: &Package, seconds: u32) -> Result<()> {
    for target in fuzz_targets(package)? {
        // What the fuzzer finds interesting goes to the first folder; the second is checked in.
        let (corpus, seeds) = (
            format!("fuzz/corpus/{target}"),
            format!("fuzz/seeds/{target}"),
        );
        fs::create_dir_all(package.folder().join(&corpus))?;
        let mut folders = vec![corpus];
        folders.extend(package.folder().join(&seeds).exists().then_some(seeds));
        shell::run(
            shell::cargo()
                .current_dir(package.folder())
                .args(["fuzz", "run", &target])
                .args(folders)
                .arg("--")
                .arg(format!("-max_total_time={seconds}"))
                .args(["-rss_limit_mb=4096", "-print_final_stats=1"])
                // cargo-fuzz asks rustc for sanitizers, which the stable toolchain has but hides.
                .env("RUSTC_BOOTSTRAP", "1"),
        )
        .with_context(|| {
            format!("fuzzing needs cargo-fuzz (cargo install --locked cargo-fuzz); target {target}")
        })?;
    }
    Ok(())
}

/// Names of the fuzz targets of a crate, sorted.
fn fuzz_targets(package: &Package) -> Result<Vec<String>> {
    let directory = package.folder().join("fuzz").join("fuzz_targets");
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(stem) = path.file_stem()
        {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}
