//! The learning rate as a pure function of the step: warm-up, then transformers' `linear`, `cosine` or `constant`.

use crate::config::{ScheduleKind, Training};

/// A learning-rate schedule over the steps of a run.
///
/// ```
/// use trainer::config::ScheduleKind;
/// use trainer::train::schedule::LrSchedule;
///
/// let schedule = LrSchedule { shape: ScheduleKind::Linear, peak: 1.0, warmup: 2, total: 10 };
/// let rates: Vec<f64> = (1..=4).map(|step| schedule.learning_rate(step)).collect();
/// assert_eq!(rates, [0.0, 0.5, 1.0, 0.875]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LrSchedule {
    /// Shape of the decay after the warm-up.
    pub shape: ScheduleKind,
    /// Highest learning rate.
    pub peak: f64,
    /// Warm-up steps, in which the rate rises from 0 to the peak.
    pub warmup: u64,
    /// Optimizer steps of the whole run.
    pub total: u64,
}

impl LrSchedule {
    /// The schedule of `training` over a run of `total` steps.
    pub fn new(training: &Training, total: u64) -> Self {
        Self { shape: training.schedule, peak: training.learning_rate, warmup: training.warmup(total), total }
    }

    /// The learning rate of optimizer step `step`, counted from 1. The first step of a warm-up has the rate 0, as in
    /// transformers.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let done = step.saturating_sub(1) as f64;
        let (warmup, total) = (self.warmup as f64, self.total as f64);
        if done < warmup {
            return self.peak * done / warmup;
        }
        let left = (total - done).max(0.0) / (total - warmup).max(1.0); // 1 → 0
        self.peak
            * match self.shape {
                ScheduleKind::Constant => 1.0,
                ScheduleKind::Linear => left,
                ScheduleKind::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * left).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_is_that_of_transformers() {
        // get_linear_schedule_with_warmup(optimizer, 2, 10).get_last_lr() before each of the ten steps, peak 1
        let expected = [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125];
        let schedule = LrSchedule { shape: ScheduleKind::Linear, peak: 1.0, warmup: 2, total: 10 };
        for (step, want) in (1..).zip(expected) {
            assert!((schedule.learning_rate(step) - want).abs() < 1e-12, "step {step}");
        }
        assert_eq!(schedule.learning_rate(11), 0.0);
    }

    #[test]
    fn cosine_falls_to_zero_and_constant_stays() {
        let cosine = LrSchedule { shape: ScheduleKind::Cosine, peak: 2.0, warmup: 0, total: 4 };
        assert!(
            (cosine.learning_rate(1) - 2.0).abs() < 1e-12 && (cosine.learning_rate(3) - 1.0).abs() < 1e-12
        );
        assert!(cosine.learning_rate(5).abs() < 1e-12);
        let constant = LrSchedule { shape: ScheduleKind::Constant, peak: 2.0, warmup: 1, total: 4 };
        assert_eq!(
            [constant.learning_rate(1), constant.learning_rate(2), constant.learning_rate(9)],
            [0.0, 2.0, 2.0]
        );
    }

    #[test]
    fn a_run_that_is_all_warmup_has_a_rate() {
        let schedule = LrSchedule { shape: ScheduleKind::Linear, peak: 1.0, warmup: 3, total: 3 };
        assert!((schedule.learning_rate(3) - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(schedule.learning_rate(4), 0.0);
    }
}
