//! No crate of the ten depends on another.

use anyhow::{Result, ensure};

use crate::workspace::{TYPES, Workspace};

/// The only crate that may link several of the ten.
const MAY_COMBINE: &str = "carlsbad-examples";

pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    for package in &workspace.packages {
        let of_ten: Vec<&str> = package
            .dependencies
            .iter()
            .map(|dependency| dependency.name.as_str())
            .filter(|name| crate::workspace::TEN.contains(name) && *name != package.name)
            .collect();
        ensure!(
            of_ten.is_empty() || package.name == MAY_COMBINE,
            "{} depends on {}: only {MAY_COMBINE} may",
            package.name,
            of_ten.join(", ")
        );
        let local: Vec<&str> = package
            .dependencies
            .iter()
            .map(|dependency| dependency.name.as_str())
            .filter(|name| workspace.packages.iter().any(|other| other.name == *name))
            .collect();
        if package.is_published() {
            ensure!(
                local
                    .iter()
                    .all(|name| [TYPES, "carlsbad-kit", package.name.as_str()].contains(name)),
                "{} is published and depends on {}: only {TYPES} is published with it",
                package.name,
                local.join(", ")
            );
        }
    }
    Ok(())
}
