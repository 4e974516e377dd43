//! What a reader of the sources should not meet: paths of one machine, and figures that nobody
//! measures.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::figures;
use crate::shell;
use crate::workspace::Workspace;

/// Beginnings of paths that exist on the machine of whoever wrote them.
const MACHINE_PATHS: [&str; 3] = ["/home/", "/root/", "/Users/"];

pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    for package in workspace.ten() {
        let count = figures::check_expected(package)?;
        ensure!(count > 0, "{} has no figures", package.name);
        for file in ["README.md", "CHANGELOG.md", "figures.toml", "api.txt"] {
            ensure!(
                package.folder().join(file).exists(),
                "{} has no {file}",
                package.name
            );
        }
    }
    let files = shell::output(
        Command::new("git")
            .arg("-C")
            .arg(&workspace.root)
            .args(["ls-files", "-z"]),
    )?;
    let this = Path::new(file!());
    for name in files.split('\0').filter(|name| !name.is_empty()) {
        // Weights are no text, and a file that is being renamed is not there.
        let Ok(text) = fs::read_to_string(workspace.root.join(name)) else {
            continue;
        };
        if this.ends_with(name) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            if let Some(path) = MACHINE_PATHS.iter().find(|path| line.contains(**path)) {
                bail!("{name}:{}: a path of one machine: {path}", number + 1);
            }
        }
    }
    Ok(())
}
