//! Randomness that can be repeated: the seed is printed, and `CARLSBAD_SEED` sets it.

/// The generator that the kit and the tests use.
pub type Rng = fastrand::Rng;

/// Sets the seed of every generator from [`rng`].
pub const SEED_VARIABLE: &str = "CARLSBAD_SEED";

/// A generator for `purpose`, whose seed is printed so that a failure can be repeated with
/// `CARLSBAD_SEED=seed`.
///
/// # Panics
/// Where `CARLSBAD_SEED` is set to something other than a number.
pub fn rng(purpose: &str) -> Rng {
    let seed = match std::env::var(SEED_VARIABLE) {
        Ok(text) => match text.parse() {
            Ok(seed) => seed,
            Err(_) => panic!("{SEED_VARIABLE}={text} is not a number"),
        },
        Err(_) => fastrand::u64(..),
    };
    println!("{purpose}: {SEED_VARIABLE}={seed}");
    Rng::with_seed(seed)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let draw = || -> Vec<u64> {
            let mut rng = super::Rng::with_seed(7);
            (0..8).map(|_| rng.u64(..)).collect()
        };
        assert_eq!(draw(), draw());
    }
}
