//! A pseudorandom permutation of `0..size` as a pure function: no list is stored, and any place is computed
//! in O(1).
//!
//! A Feistel network permutes the numbers of 2·b bits (Luby and Rackoff 1988). A result outside of `0..size`
//! goes through the network again until it is inside (cycle walking, Black and Rogaway 2002); 2·b is the
//! smallest even width that fits, so at least a quarter of the results are inside.

/// A permutation of `0..size`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Permutation {
    size: u64,
    half: u32,
    key: u64,
}

/// Number of rounds: twice the four that make a Feistel network pseudorandom, because small sizes have few
/// bits per round.
const ROUNDS: u64 = 8;

impl Permutation {
    /// The permutation for a seed and a `purpose`, numbers that distinguish one use from another.
    pub(crate) fn new(size: u64, seed: u64, purpose: &[u64]) -> Self {
        let bits = u64::BITS - size.saturating_sub(1).leading_zeros();
        let key = purpose.iter().fold(mix(seed), |key, number| mix(key ^ mix(*number)));
        Self { size, half: bits.div_ceil(2).max(1), key }
    }

    /// The number at `place`, which is below the size.
    pub(crate) fn at(&self, place: u64) -> u64 {
        debug_assert!(place < self.size);
        let mut number = place;
        loop {
            number = self.network(number);
            if number < self.size {
                return number;
            }
        }
    }

    fn network(&self, number: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (number >> self.half, number & mask);
        for round in 0..ROUNDS {
            let turned = left ^ (mix(self.key ^ mix(right ^ (round << 56))) & mask);
            (left, right) = (right, turned);
        }
        left << self.half | right
    }
}

/// SplitMix64's output function: every input bit reaches every output bit (Steele, Lea and Flood 2014).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(size: u64, seed: u64, purpose: &[u64]) -> Vec<u64> {
        let permutation = Permutation::new(size, seed, purpose);
        (0..size).map(|place| permutation.at(place)).collect()
    }

    #[test]
    fn every_number_stands_somewhere_once() {
        for seed in 0..8 {
            for size in (1..70).chain([255, 256, 257, 1023, 4096, 4097, 100_003]) {
                let mut seen = order(size, seed, &[1]);
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..size), "{size} {seed}");
            }
        }
    }

    #[test]
    fn seed_and_purpose_change_the_order() {
        let orders = [order(50, 1, &[0]), order(50, 2, &[0]), order(50, 1, &[1]), order(50, 1, &[0, 0])];
        for (i, one) in orders.iter().enumerate() {
            assert_eq!(orders.iter().position(|other| other == one), Some(i));
        }
        assert_eq!(order(50, 1, &[0]), orders[0]);
    }

    #[test]
    fn each_number_comes_to_each_place_about_equally_often() {
        for size in [2, 3, 5, 10, 33] {
            let draws = 4000;
            let mut counts = vec![vec![0_u32; size as usize]; size as usize];
            for seed in 0..draws {
                for (place, number) in order(size, seed, &[7]).into_iter().enumerate() {
                    counts[place][number as usize] += 1;
                }
            }
            let expected = draws as f64 / size as f64;
            let worst = counts.iter().flatten().map(|c| (f64::from(*c) - expected).abs() / expected.sqrt());
            // Standard deviations: among at most 1,100 cells, six never happens by chance.
            assert!(worst.fold(0.0, f64::max) < 6.0, "{size}");
        }
    }
}
