#!/bin/sh
# rustdoc with its unstable options. Only rustdoc gets the variable: with it in cargo's environment
# every dependency whose build script looks at it would be built anew.
RUSTC_BOOTSTRAP=1 exec rustdoc "$@"
