//! What more ranks would make of a run, from one rank's speed and the speed of the lines between them.
//!
//! ```text
//! step = most tokens of a rank / tokens per second + bytes sent by a rank / bytes per second
//! bytes = ((W−1)/W) · 4 · (2 N·D + 2 P + T)
//! ```
//!
//! over W ranks: embeddings (N, D) are gathered, their gradients scattered back, the gradients of P trained parameters summed
//! (their parts go out and come back), and the ids of T tokens handed round. Nothing of it is assumed to overlap, so the
//! truth is a little better. Tokens are those of a real batch, dealt as the run deals them.

use std::fmt;

use crate::data::partition::Partition;

/// A batch and the model, as far as ranks are concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// (N) tokens of each sequence of a batch.
    pub lengths: Vec<usize>,
    /// D.
    pub width: usize,
    /// P.
    pub trained: usize,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// One rank's tokens per second.
    pub tokens_per_second: f64,
    /// Bytes per second that a rank sends.
    pub bytes_per_second: f64,
}

/// A run on so many ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScalingEstimate {
    /// W.
    pub ranks: usize,
    /// Tokens of the rank that has the most.
    pub most: usize,
    /// By how much it exceeds the mean, a fraction.
    pub imbalance: f64,
    /// Bytes that a rank sends in a step.
    pub bytes: f64,
    /// Seconds of a step, and how many times faster than one rank that is, where rates are known.
    pub step: Option<(f64, f64)>,
}

impl Workload {
    /// This load on `ranks` ranks.
    pub fn on_ranks(&self, ranks: usize, rates: Option<Rates>) -> ScalingEstimate {
        let share = Partition::balance(&self.lengths, ranks);
        let tokens = |pieces: &[usize]| pieces.iter().map(|&piece| self.lengths[piece]).sum::<usize>();
        let most = share.ranks().map(tokens).max().unwrap_or(0);
        let all: usize = self.lengths.iter().sum();
        let others = (ranks - 1) as f64 / ranks as f64;
        let numbers = 2 * self.lengths.len() * self.width + 2 * self.trained + all;
        let bytes = others * 4.0 * numbers as f64;
        let step = rates.map(|rates| {
            let seconds = most as f64 / rates.tokens_per_second + bytes / rates.bytes_per_second;
            (seconds, all as f64 / rates.tokens_per_second / seconds)
        });
        ScalingEstimate { ranks, most, imbalance: share.imbalance(&self.lengths), bytes, step }
    }
}

/// Rows of a table, with a heading.
#[derive(Debug)]
pub struct ScalingTable(pub Vec<ScalingEstimate>);

impl fmt::Display for ScalingTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>7}{:>16}{:>12}{:>16}{:>12}{:>10}",
            "ranks", "tokens a rank", "imbalance", "MB a step", "s a step", "faster"
        )?;
        for ScalingEstimate { ranks, most, imbalance, bytes, step } in &self.0 {
            write!(f, "{ranks:>7}{most:>16}{:>11.2}%{:>16.1}", imbalance * 100.0, bytes / 1e6)?;
            match step {
                Some((seconds, faster)) => writeln!(f, "{seconds:>12.3}{faster:>9.1}×")?,
                None => writeln!(f, "{:>12}{:>10}", "–", "–")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_alone_sends_nothing() {
        let workload = Workload { lengths: vec![3, 5], width: 7, trained: 11 };
        let rates = Rates { tokens_per_second: 4.0, bytes_per_second: 1.0 };
        let alone = ScalingEstimate { ranks: 1, most: 8, imbalance: 0.0, bytes: 0.0, step: Some((2.0, 1.0)) };
        assert_eq!(workload.on_ranks(1, Some(rates)), alone);
    }

    #[test]
    fn the_formula_by_hand() {
        let workload = Workload { lengths: vec![4, 2, 2], width: 5, trained: 50 };
        let two = workload.on_ranks(2, Some(Rates { tokens_per_second: 1.0, bytes_per_second: 276.0 }));
        // ½ · 4 · (2·3·5 + 2·50 + 8) = 276
        assert_eq!((two.most, two.imbalance, two.bytes), (4, 0.0, 276.0));
        assert_eq!(two.step, Some((5.0, 1.6)));
        let text = ScalingTable(vec![two, workload.on_ranks(3, None)]).to_string();
        assert!(text.contains("5.000      1.6×") && text.lines().count() == 3, "{text}");
    }
}
