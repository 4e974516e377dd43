//! The documentation builds without a warning.

use anyhow::Result;

use crate::shell;
use crate::workspace::Workspace;

pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    for package in &workspace.packages {
        // One at a time, each with its own features.
        shell::run(
            shell::cargo()
                .args(["doc", "--quiet", "--no-deps"])
                .args(package.cargo_arguments())
                .env("RUSTDOCFLAGS", "-D warnings"),
        )?;
    }
    Ok(())
}
