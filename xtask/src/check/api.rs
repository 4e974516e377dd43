//! `api.txt` is a crate's public API, so that a change to it shows in a diff.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail};

use crate::shell;
use crate::workspace::{Package, TYPES, Workspace};

pub(crate) fn check(workspace: &Workspace, ten: &[&Package], bless: bool) -> Result<()> {
    let types = workspace.packages.iter().filter(|p| p.name == TYPES);
    for package in types.chain(ten.iter().copied()) {
        let found = list(workspace, package)?;
        let path = package.folder().join("api.txt");
        if bless {
            fs::write(&path, &found).with_context(|| format!("cannot write {}", path.display()))?;
            continue;
        }
        let written = fs::read_to_string(&path).unwrap_or_default();
        if written != found {
            bail!(
                "{} is not the API of {}:\n{}\n\
                 If the change is meant: cargo xtask check api --bless",
                path.display(),
                package.name,
                difference(&written, &found)
            );
        }
    }
    Ok(())
}

fn list(workspace: &Workspace, package: &Package) -> Result<String> {
    // By the toolchain in use, not by the nightly one that cargo-public-api would look for.
    shell::run(
        shell::cargo()
            .args(["rustdoc", "--quiet", "--lib"])
            .args(package.cargo_arguments())
            .args(["--", "-Z", "unstable-options", "--output-format", "json"])
            // The format is behind RUSTC_BOOTSTRAP on the stable toolchain.
            .env(
                "RUSTDOC",
                workspace.root.join("xtask/src/check/rustdoc_unstable.sh"),
            ),
    )?;
    let json = workspace
        .target
        .join("doc")
        .join(format!("{}.json", package.name.replace('-', "_")));
    shell::output(
        shell::cargo()
            .args(["public-api", "--omit"])
            .arg("blanket-impls,auto-trait-impls,auto-derived-impls")
            .arg("--rustdoc-json")
            .arg(json),
    )
    .context("API lists need cargo-public-api: cargo install --locked cargo-public-api")
}

fn difference(written: &str, found: &str) -> String {
    let old: BTreeSet<&str> = written.lines().collect();
    let new: BTreeSet<&str> = found.lines().collect();
    let gone = old.difference(&new).map(|line| format!("- {line}"));
    let come = new.difference(&old).map(|line| format!("+ {line}"));
    gone.chain(come).collect::<Vec<_>>().join("\n")
}
