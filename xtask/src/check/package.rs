//! Each crate's package builds where nothing of this workspace is in reach.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell;
use crate::workspace::{Package, TYPES, Workspace};

pub(crate) fn check(workspace: &Workspace, ten: &[&Package]) -> Result<()> {
    for package in ten {
        // Together: the crate's package names a version of the types that no registry has yet.
        shell::run(
            shell::cargo()
                .args(["package", "--quiet", "--no-verify", "--allow-dirty"])
                .args(["-p", TYPES, "-p", &package.name]),
        )?;
        let outside = tempfile::Builder::new()
            .prefix("carlsbad-package-")
            .tempdir()
            .context("cannot make a directory outside the workspace")?;
        let mut members = Vec::new();
        for one in workspace
            .packages
            .iter()
            .filter(|p| p.name == TYPES || p.name == package.name)
        {
            members.push(unpack(workspace, one, outside.path())?);
        }
        write_workspace(workspace, outside.path(), &members)?;
        shell::run(
            shell::cargo()
                .current_dir(outside.path())
                .args(["check", "--quiet"])
                .args(package.cargo_arguments())
                .env("CARGO_TARGET_DIR", &workspace.target),
        )
        .with_context(|| format!("{} does not build from its package", package.name))?;
    }
    Ok(())
}

/// Unpacks a package; gives its folder's name.
fn unpack(workspace: &Workspace, package: &Package, into: &Path) -> Result<String> {
    let name = format!("{}-{}", package.name, package.version);
    let archive = workspace
        .target
        .join("package")
        .join(format!("{name}.crate"));
    shell::output(
        Command::new("tar")
            .arg("-xzf")
            .arg(&archive)
            .arg("-C")
            .arg(into),
    )?;
    Ok(name)
}

/// A workspace that takes the types from beside it, as a registry would give them, and every other
/// dependency in the version that this workspace was tested with.
fn write_workspace(workspace: &Workspace, outside: &Path, members: &[String]) -> Result<()> {
    let list: Vec<String> = members.iter().map(|name| format!("{name:?}")).collect();
    let types = members
        .iter()
        .find(|name| name.starts_with(TYPES))
        .context("no package of the types")?;
    fs::write(
        outside.join("Cargo.toml"),
        format!(
            "[workspace]\nresolver = \"3\"\nmembers = [{}]\n\n\
             [patch.crates-io]\n{TYPES} = {{ path = {types:?} }}\n",
            list.join(", ")
        ),
    )?;
    fs::copy(
        workspace.root.join("Cargo.lock"),
        outside.join("Cargo.lock"),
    )?;
    Ok(())
}
