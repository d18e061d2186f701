//! Predicts the time of a step on more ranks, from the speed of one rank and of the network.
//!
//! ```text
//! step = most tokens of a rank / tokens per second + bytes sent by a rank / bytes per second
//! bytes = ((W−1)/W) · 4 · (2 N·D + 2 P + T)
//! ```
//!
//! over W ranks: all-gather of the embeddings (N, D), reduce-scatter of their gradients, all-reduce of the gradients of P trained
//! parameters (each part is sent out and comes back), and all-gather of the ids of T tokens. The formula assumes that nothing
//! overlaps, so the real time is a little shorter. The tokens are those of a real batch, distributed as in a run.

use std::fmt;

use crate::data::partition::Partition;

/// The work of a step that is divided among ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// (N) tokens of each sequence of the batch.
    pub lengths: Vec<usize>,
    /// Dimension D of the embeddings.
    pub width: usize,
    /// Number P of trained parameters.
    pub trained: usize,
}

/// Measured speeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Tokens per second of one rank.
    pub tokens_per_second: f64,
    /// Bytes per second that a rank can send.
    pub bytes_per_second: f64,
}

/// The predicted step on a number of ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScalingEstimate {
    /// Number W of ranks.
    pub ranks: usize,
    /// Tokens of the rank that has the most.
    pub most: usize,
    /// By what fraction `most` exceeds the mean.
    pub imbalance: f64,
    /// Bytes that a rank sends per step.
    pub bytes: f64,
    /// Seconds per step, and the speed-up over one rank; none without rates.
    pub step: Option<(f64, f64)>,
}

impl Workload {
    /// Predicts a step on `ranks` ranks.
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

/// Predictions as a table with a heading.
#[derive(Debug)]
pub struct ScalingTable(pub Vec<ScalingEstimate>);

impl fmt::Display for ScalingTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>7}{:>16}{:>12}{:>16}{:>12}{:>10}",
            "ranks", "tokens/rank", "imbalance", "MB/step", "s/step", "speed-up"
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
