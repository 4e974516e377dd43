//! What the workspace consists of, as cargo tells it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::shell;

/// The ten crates, each of one paper.
pub(crate) const TEN: [&str; 10] = [
    "rund-rt",
    "krcore",
    "gpulet",
    "directcxl",
    "tetris-store",
    "campo",
    "huvm",
    "whale",
    "cachew",
    "soter",
];

/// The crate that the ten may share.
pub(crate) const TYPES: &str = "carlsbad-types";

/// The workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Workspace {
    /// Its crates.
    pub(crate) packages: Vec<Package>,
    #[serde(rename = "workspace_root")]
    pub(crate) root: PathBuf,
    #[serde(rename = "target_directory")]
    pub(crate) target: PathBuf,
}

/// A crate of the workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) dependencies: Vec<Dependency>,
    pub(crate) targets: Vec<Target>,
    manifest_path: PathBuf,
    #[serde(default)]
    metadata: Option<Metadata>,
    /// Registries it may be published to; an empty list says none.
    publish: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) kind: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Metadata {
    #[serde(default)]
    carlsbad: Carlsbad,
}

/// `[package.metadata.carlsbad]`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Carlsbad {
    /// The features that build without a CUDA toolkit.
    #[serde(default)]
    ci_features: Vec<String>,
    /// The test targets that `cargo xtask vm` runs.
    #[serde(default)]
    vm_tests: Vec<String>,
    /// The bench targets that `cargo xtask figures` runs in a virtual machine.
    #[serde(default)]
    vm_benches: Vec<String>,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn load() -> Result<Self> {
        let text =
            shell::output(shell::cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
        serde_json::from_str(&text).context("cargo metadata: unexpected answer")
    }

    /// The one of the ten called `name`, or all of the ten that exist.
    pub(crate) fn chosen(&self, name: Option<&str>) -> Result<Vec<&Package>> {
        let existing: Vec<_> = self.ten().collect();
        let Some(name) = name else {
            return Ok(existing);
        };
        match existing.iter().find(|package| package.name == name) {
            Some(package) => Ok(vec![package]),
            None => bail!(
                "there is no crate {name} yet; there is {}",
                existing
                    .iter()
                    .map(|package| package.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    }

    /// Those of the ten that exist.
    pub(crate) fn ten(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| package.is_of_ten())
    }
}

impl Package {
    /// Whether it is one of the ten.
    pub(crate) fn is_of_ten(&self) -> bool {
        TEN.contains(&self.name.as_str())
    }

    /// Whether it goes to a registry.
    pub(crate) fn is_published(&self) -> bool {
        !self.publish.as_ref().is_some_and(Vec::is_empty)
    }

    /// Its folder.
    pub(crate) fn folder(&self) -> &Path {
        self.manifest_path.parent().unwrap_or(Path::new("."))
    }

    /// The features that every check builds, besides none and the default ones.
    pub(crate) fn ci_features(&self) -> &[String] {
        self.metadata
            .as_ref()
            .map_or(&[], |metadata| &metadata.carlsbad.ci_features)
    }

    /// `-p NAME --features LIST`.
    pub(crate) fn cargo_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["-p".to_owned(), self.name.clone()];
        if !self.ci_features().is_empty() {
            arguments.push("--features".to_owned());
            arguments.push(self.ci_features().join(","));
        }
        arguments
    }

    /// The test targets that run in a virtual machine.
    pub(crate) fn vm_tests(&self) -> &[String] {
        self.metadata
            .as_ref()
            .map_or(&[], |metadata| &metadata.carlsbad.vm_tests)
    }

    /// Whether a bench target measures in a virtual machine.
    pub(crate) fn is_vm_bench(&self, bench: &str) -> bool {
        self.metadata
            .as_ref()
            .is_some_and(|metadata| metadata.carlsbad.vm_benches.iter().any(|one| one == bench))
    }

    /// Its targets of a kind such as `bench`.
    pub(crate) fn targets_of(&self, kind: &str) -> impl Iterator<Item = &str> {
        self.targets
            .iter()
            .filter(move |target| target.kind.iter().any(|k| k == kind))
            .map(|target| target.name.as_str())
    }
}
