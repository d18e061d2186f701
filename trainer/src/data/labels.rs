//! The classes of a labelled data set, from which positives and negatives are drawn.
//!
//! A row's positive is another row of its class, its negatives are rows of other classes. They are drawn anew
//! each time the row is used, as a pure function of the seed, the row and the number of its earlier uses.
//! Memory: 8 bytes per row.

use super::permutation::Permutation;

/// The class of each row, and the rows of each class.
#[derive(Debug)]
pub struct Labels {
    /// Label of each class.
    names: Vec<String>,
    /// Class of each row.
    of_row: Vec<u32>,
    /// All rows, grouped by class, ascending within a class.
    rows: Vec<u32>,
    /// Start of each class in `rows`, and the end of the last one.
    starts: Vec<usize>,
}

/// Rows drawn for one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Drawn {
    /// Rows of its class, in the order in which they are tried.
    pub(super) positives: Vec<u64>,
    /// Rows of other classes, likewise.
    pub(super) negatives: Vec<u64>,
}

/// First number of the `purpose` of each [`Permutation`], as in `mixture.rs`.
const POSITIVES: u64 = 101;
const NEGATIVES: u64 = 102;
const SUBSET: u64 = 103;

/// Number of positives that are drawn, in case the first ones have the same text as the row.
const TRIES: u64 = 4;

impl Labels {
    /// Groups rows by class.
    ///
    /// # Errors
    /// There is only one class, or no class has two rows.
    pub(super) fn new(of_row: Vec<u32>, names: Vec<String>) -> Result<Self, String> {
        if let [only] = names.as_slice() {
            return Err(format!(
                "has only one class, `{only}` in all {} rows, expected two or more to tell apart\n\
                 hint: if these rows are not labelled texts, set `kind` and `columns` in the configuration",
                of_row.len()
            ));
        }
        if u32::try_from(of_row.len()).is_err() {
            return Err(format!("has {} labelled rows, expected fewer than 2³²", of_row.len()));
        }
        let mut starts = vec![0; names.len() + 1];
        of_row.iter().for_each(|class| starts[*class as usize + 1] += 1);
        (1..starts.len()).for_each(|class| starts[class] += starts[class - 1]);
        let (mut next, mut rows) = (starts.clone(), vec![0; of_row.len()]);
        for (row, class) in of_row.iter().enumerate() {
            let place = &mut next[*class as usize];
            rows[*place] = row as u32;
            *place += 1;
        }
        let labels = Self { names, of_row, rows, starts };
        if (0..labels.names.len()).all(|class| labels.of_class(class).len() < 2) {
            return Err(format!(
                "has {} rows of {} classes, but no class has two rows, so no row has a positive",
                labels.rows.len(),
                labels.names.len()
            ));
        }
        Ok(labels)
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.names.len()
    }

    /// The class of a row.
    pub(super) fn of(&self, row: u64) -> u32 {
        self.of_row[row as usize]
    }

    fn of_class(&self, class: usize) -> &[u32] {
        &self.rows[self.starts[class]..self.starts[class + 1]]
    }

    /// Number of rows that are the only one of their class, and so have no positive.
    pub(super) fn singleton_rows(&self) -> u64 {
        (0..self.classes()).filter(|&class| self.of_class(class).len() == 1).count() as u64
    }

    /// Draws `samples` rows, ascending, stratified by class (largest-remainder method); all rows if there are
    /// fewer. Rows that are alone in their class are left out.
    pub(super) fn sample(&self, samples: u64, seed: u64, set: u64) -> Vec<u64> {
        let sizes: Vec<u64> = (0..self.classes())
            .map(|class| self.of_class(class).len() as u64)
            .map(|size| if size == 1 { 0 } else { size })
            .collect();
        let all: u64 = sizes.iter().sum();
        let samples = samples.min(all);
        let share = |size: u64| u128::from(size) * u128::from(samples);
        let mut quotas: Vec<u64> = sizes.iter().map(|&size| (share(size) / u128::from(all)) as u64).collect();
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|&class| (std::cmp::Reverse(share(sizes[class]) % u128::from(all)), class));
        let left = samples - quotas.iter().sum::<u64>();
        order.iter().take(left as usize).for_each(|&class| quotas[class] += 1);
        let mut rows = Vec::with_capacity(samples as usize);
        for (class, &quota) in quotas.iter().enumerate() {
            let members = self.of_class(class);
            let order = Permutation::new(members.len() as u64, seed, &[SUBSET, set, class as u64]);
            rows.extend((0..quota).map(|place| u64::from(members[order.at(place) as usize])));
        }
        rows.sort_unstable();
        rows
    }

    /// Draws positives and negatives for the use number `turn` of `row`, a few more than needed.
    pub(super) fn draw(&self, row: u64, negatives: usize, seed: u64, set: u64, turn: u64) -> Drawn {
        let class = self.of(row) as usize;
        let members = self.of_class(class);
        let own = members.partition_point(|&member| u64::from(member) < row) as u64;
        let others = (members.len() - 1) as u64;
        let order = Permutation::new(others, seed, &[POSITIVES, set, row, turn]);
        let positives = (0..TRIES.min(others))
            .map(|place| order.at(place))
            .map(|member| u64::from(members[(member + u64::from(member >= own)) as usize]))
            .collect();
        let (start, end) = (self.starts[class], self.starts[class + 1]);
        let strangers = (self.rows.len() - members.len()) as u64;
        let order = Permutation::new(strangers, seed, &[NEGATIVES, set, row, turn]);
        let negatives = (0..(negatives as u64 + TRIES).min(strangers))
            .map(|place| order.at(place) as usize)
            .map(|place| u64::from(self.rows[if place < start { place } else { place - start + end }]))
            .collect();
        Drawn { positives, negatives }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Labels with `sizes[c]` rows of class c. The rows go through the classes in turn: 0, 1, 2, 0, 1, 2, …
    fn labels(sizes: &[usize]) -> Labels {
        let mut left = sizes.to_vec();
        let mut of_row = Vec::new();
        while left.iter().any(|&left| left > 0) {
            for class in 0..left.len() {
                if left[class] > 0 {
                    left[class] -= 1;
                    of_row.push(class as u32);
                }
            }
        }
        Labels::new(of_row, (0..sizes.len()).map(|class| format!("c{class}")).collect()).unwrap()
    }

    #[test]
    fn positives_are_of_the_class_and_negatives_of_others() {
        let labels = labels(&[5, 1, 30, 2]);
        for seed in 0..20 {
            for row in (0..38).filter(|&row| labels.of(row) != 1) {
                let drawn = labels.draw(row, 6, seed, 0, 3);
                assert_eq!(drawn, labels.draw(row, 6, seed, 0, 3));
                assert!(!drawn.positives.is_empty() && !drawn.positives.contains(&row));
                assert!(drawn.positives.iter().all(|&other| labels.of(other) == labels.of(row)));
                assert!(drawn.negatives.iter().all(|&other| labels.of(other) != labels.of(row)));
                assert_eq!(drawn.negatives.len(), if labels.of(row) == 2 { 8 } else { 10 });
                let mut once = drawn.negatives.clone();
                once.sort_unstable();
                once.dedup();
                assert_eq!(once.len(), drawn.negatives.len());
            }
        }
    }

    #[test]
    fn every_other_row_is_drawn_at_times() {
        let labels = labels(&[4, 3, 2]);
        let (mut positives, mut negatives) = (vec![], vec![]);
        for turn in 0..200 {
            let drawn = labels.draw(0, 1, 1, 0, turn);
            positives.push(drawn.positives[0]);
            negatives.push(drawn.negatives[0]);
        }
        for (mut drawn, class) in [(positives, true), (negatives, false)] {
            drawn.sort_unstable();
            drawn.dedup();
            let expected: Vec<u64> = (1..9).filter(|&row| (labels.of(row) == 0) == class).collect();
            assert_eq!(drawn, expected);
        }
    }

    #[test]
    fn samples_keep_the_proportions_of_the_classes() {
        let labels = labels(&[500, 300, 1, 199]);
        let count = |rows: &[u64], class| rows.iter().filter(|&&row| labels.of(row) == class).count();
        let rows = labels.sample(100, 7, 0);
        assert_eq!([0, 1, 2, 3].map(|class| count(&rows, class)), [50, 30, 0, 20]);
        assert!(rows.windows(2).all(|two| two[0] < two[1]));
        assert_eq!(rows, labels.sample(100, 7, 0));
        assert_ne!(rows, labels.sample(100, 8, 0));
        // 3 of 999: one and a half, nine tenths, six tenths.
        assert_eq!([0, 1, 3].map(|class| count(&labels.sample(3, 7, 0), class)), [1, 1, 1]);
        assert_eq!((labels.sample(u64::MAX, 7, 0).len(), labels.singleton_rows()), (999, 1));
    }

    #[test]
    fn what_teaches_nothing_is_refused() {
        let error = Labels::new(vec![0; 9], vec!["x".to_owned()]).unwrap_err();
        assert!(error.starts_with("has only one class, `x` in all 9 rows"), "{error}");
        let error = Labels::new(vec![0, 1], vec!["x".to_owned(), "y".to_owned()]).unwrap_err();
        assert!(error.starts_with("has 2 rows of 2 classes, but no class has two"), "{error}");
    }
}
