//! `cargo xtask peers`: a crate against unmodified runtimes.

use anyhow::{Result, bail};

use crate::workspace::{Package, Workspace};

/// Arguments of `cargo xtask peers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One of the ten; all that exist without it.
    #[arg(value_name = "CRATE")]
    name: Option<String>,
    /// Install the runtimes by pip, into an environment outside the source tree.
    #[arg(long)]
    install: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let workspace = Workspace::load()?;
    for package in workspace.chosen(arguments.name.as_deref())? {
        of(package, arguments.install)?;
    }
    Ok(())
}

/// The peers of one crate.
pub(crate) fn of(package: &Package, _install: bool) -> Result<()> {
    bail!("{} has no peers", package.name)
}

/// The figures that are measured in unmodified runtimes, appended to `samples`.
pub(crate) fn measure(package: &Package, _samples: &std::path::Path) -> Result<()> {
    bail!("{} has no peers", package.name)
}
