//! `cargo xtask check`: what a test cannot see.

mod api;
mod docs;
mod features;
mod independence;
mod licences;
mod package;
mod words;

use std::time::Instant;

use anyhow::{Context, Result};

use crate::workspace::{Package, Workspace};

/// Arguments of `cargo xtask check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these checks; all without.
    #[arg(value_enum, value_name = "CHECK")]
    checks: Vec<Check>,
    /// Only this one of the ten.
    #[arg(long = "crate", value_name = "CRATE")]
    name: Option<String>,
    /// Write each API list anew instead of comparing.
    #[arg(long)]
    bless: bool,
    /// Print the features to build the whole workspace with (for `--features`), and check nothing.
    #[arg(long)]
    list_features: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Check {
    /// No crate of the ten depends on another; only `examples` links several.
    Independence,
    /// What `figures.toml` asks for can be measured, and no machine's paths are in the sources.
    Words,
    /// Each crate builds without features, with the default ones, with each, and with all in CI.
    Features,
    /// `api.txt` is each crate's public API.
    Api,
    /// Licences and duplicate or banned dependencies, by cargo-deny.
    Licences,
    /// Each crate's package builds outside this workspace.
    Package,
    /// The documentation builds without a warning.
    Docs,
}

const ALL: [Check; 7] = [
    Check::Independence,
    Check::Words,
    Check::Features,
    Check::Api,
    Check::Licences,
    Check::Package,
    Check::Docs,
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let workspace = Workspace::load()?;
    let ten = workspace.chosen(arguments.name.as_deref())?;
    if arguments.list_features {
        let of = |package: &Package| {
            let name = package.name.clone();
            let qualified = move |feature: &String| format!("{name}/{feature}");
            package
                .ci_features()
                .iter()
                .map(qualified)
                .collect::<Vec<_>>()
        };
        let list: Vec<String> = ten.iter().flat_map(|package| of(package)).collect();
        println!("{}", list.join(","));
        return Ok(());
    }
    let checks = if arguments.checks.is_empty() {
        &ALL[..]
    } else {
        &arguments.checks
    };
    for check in checks {
        let start = Instant::now();
        match check {
            Check::Independence => independence::check(&workspace),
            Check::Words => words::check(&workspace),
            Check::Features => features::check(&ten),
            Check::Api => api::check(&workspace, &ten, arguments.bless),
            Check::Licences => licences::check(&workspace),
            Check::Package => package::check(&workspace, &ten),
            Check::Docs => docs::check(&workspace),
        }
        .with_context(|| format!("check {check:?}"))?;
        eprintln!("ok {check:?} ({:.1} s)", start.elapsed().as_secs_f64());
    }
    Ok(())
}
