//! The lines that `trainer plan` prints and that a run starts with.

use std::fmt;

use super::{Cost, Plan};
use crate::config::ScheduleKind;
use crate::model::chunk::Limit;
use crate::train::memory::format_bytes;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cost { parameters, trained, lora_rank, tokens, .. } = self.cost;
        let (config, training) = (&self.config, &self.config.training);
        writeln!(f, "run        {} → {}", config.name, config.output.display())?;
        writeln!(
            f,
            "model      {}: {:.1} M parameters, {:.2} M trained{}",
            config.model.path,
            parameters as f64 / 1e6,
            trained as f64 / 1e6,
            lora_rank.map_or_else(String::new, |rank| format!(" (LoRA, rank {rank})"))
        )?;
        for set in self.mixture.sets() {
            writeln!(
                f,
                "data       {}: {} rows per epoch ({}, {}) from {}",
                set.name,
                set.rows,
                set.kind,
                set.loss,
                set.path.display()
            )?;
        }
        let decay = match training.schedule {
            ScheduleKind::Constant => "then constant",
            ScheduleKind::Linear => "linear decay to 0",
            ScheduleKind::Cosine => "cosine decay to 0",
        };
        writeln!(
            f,
            "steps      {} steps of {} rows; peak learning rate {:e}, {} warm-up steps, {decay}",
            self.steps,
            training.batch_size,
            training.learning_rate,
            training.warmup(self.steps),
        )?;
        writeln!(
            f,
            "tokens     about {tokens:.0} per step, {:.2} M in total; queries are truncated at {} tokens, documents at {}",
            tokens * self.steps as f64 / 1e6,
            self.lengths.query,
            self.lengths.document
        )?;
        let chunk = match self.budget.chunk {
            Limit::Tokens(tokens) => format!("{tokens} tokens"),
            Limit::Sequences(sequences) => format!("{sequences} sequences"),
        };
        writeln!(
            f,
            "memory     at most {}: {} for parameters and moments, {} for activations in chunks of {chunk}; {} are available",
            format_bytes(self.cost.peak_bytes()),
            format_bytes(self.cost.state_bytes),
            format_bytes(self.cost.activation_bytes),
            format_bytes(self.cost.available_bytes)
        )?;
        for (set, _) in &self.sets {
            writeln!(f, "evaluation {}", set.name())?;
        }
        Ok(())
    }
}
