//! What the tests and benches of the Carlsbad crates share.
//!
//! | module | for |
//! |---|---|
//! | [`capability`] | a test that needs a kernel feature or a peer: run it, or say how to get it |
//! | [`child`] | tests with several processes: roles of the same binary, killed at seeded moments |
//! | [`memory`] | what processes really use: PSS, private pages, the machine's shared memory |
//! | [`leak`] | nothing is left behind: descriptors, mappings, mounts, children, shared memory |
//! | [`scratch`] | a directory on tmpfs or on disk that goes away with its handle |
//! | [`seed`] | randomness that can be repeated |
//! | [`sample`] | ours and the rival's timings, interleaved, with medians |
//! | [`figure`] | figures that `cargo xtask figures` collects from bench targets |
//! | [`page_swap`] | far memory as a pager reaches it: what direct access is measured beside |
//! | [`plot`] | SVG plots that are readable on dark and on light pages |
//!
//! This crate is never published: it is a path-only development dependency.

// It speaks to the person who runs a test or a bench, and fails a test by a panic: that is its job.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::panic)]

pub mod capability;
pub mod child;
pub mod figure;
pub mod leak;
pub mod memory;
pub mod page_swap;
pub mod plot;

pub mod sample;
pub mod scratch;
pub mod seed;
