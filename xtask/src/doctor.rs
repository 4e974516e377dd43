//! `cargo xtask doctor`: what this machine has, and how to get what it lacks.

use anyhow::Result;
use carlsbad_kit::capability::{Capability, State};

/// Arguments of `cargo xtask doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Fail unless these are there (as in CARLSBAD_REQUIRE).
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    require: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    for name in &arguments.require {
        anyhow::ensure!(
            Capability::ALL.iter().any(|known| known.name() == name),
            "no capability is called {name}"
        );
    }
    let mut missing = Vec::new();
    for capability in Capability::ALL {
        match capability.state() {
            State::Present(seen) => println!("  yes  {:<12} {seen}", capability.name()),
            state => {
                if let State::Missing(why) = state {
                    println!("  no   {:<12} {why}", capability.name());
                }
                println!("       {:<12} fix: {}", "", capability.fix());
                if arguments
                    .require
                    .iter()
                    .any(|name| name == capability.name())
                {
                    missing.push(capability.name());
                }
            }
        }
    }
    anyhow::ensure!(
        missing.is_empty(),
        "required, but missing: {}",
        missing.join(", ")
    );
    Ok(())
}
