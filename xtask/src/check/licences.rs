//! Licences, sources and duplicates of what the workspace depends on, by `deny.toml`.

use anyhow::{Context, Result};

use crate::shell;
use crate::workspace::Workspace;

pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    shell::run(
        shell::cargo()
            .current_dir(&workspace.root)
            // Advisories would need a database from the network.
            .args(["deny", "--offline", "--log-level", "error", "check"])
            .args(["licenses", "bans", "sources"]),
    )
    .context("licences need cargo-deny: cargo install --locked cargo-deny")
}
