//! `cargo xtask vm`: a crate's tests on another kernel, in QEMU.

use anyhow::Result;

use crate::workspace::Workspace;

/// Arguments of `cargo xtask vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One of the ten; all that exist without it.
    #[arg(value_name = "CRATE")]
    name: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let workspace = Workspace::load()?;
    for package in workspace.chosen(arguments.name.as_deref())? {
        let _ = package.vm_tests();
    }
    Ok(())
}
