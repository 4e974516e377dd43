//! The tour: every crate does its real job on real input.

fn main() {}
