//! Developer commands of the workspace: `cargo xtask help`.
//!
//! They run cargo, Python and QEMU, and link none of the ten crates.

// What these commands print is what they are for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod check;
mod data;
mod doctor;
mod figures;
mod peers;
mod rund_kernel;
mod shell;
mod soak;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Developer commands of the Carlsbad workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure the figures of a crate beside their rivals, and render its README's table.
    Figures(figures::Arguments),
    /// Check what a test cannot: independence, features, API lists, licences, packages, docs.
    Check(check::Arguments),
    /// Show what this machine has, and how to get what it lacks.
    Doctor(doctor::Arguments),
    /// Fetch the larger models by pip, into a cache outside the source tree.
    Data(data::Arguments),
    /// Run a crate against unmodified runtimes: ONNX Runtime, torch.
    Peers(peers::Arguments),
    /// Run the fault tests at full length, and the fuzzers.
    Soak(soak::Arguments),
    /// Run a crate's tests on another kernel, in QEMU.
    Vm(vm::Arguments),
    /// Build the condensed kernel of rund-rt's QEMU guests, and measure it beside Debian's.
    RundKernel(rund_kernel::Arguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Figures(arguments) => figures::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Data(arguments) => data::run(&arguments),
        Command::Peers(arguments) => peers::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
        Command::Vm(arguments) => vm::run(&arguments),
        Command::RundKernel(arguments) => rund_kernel::run(&arguments),
    }
}
