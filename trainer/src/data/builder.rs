//! Builds batches from rows: tokenises every text once, and lays out the table of each loss.
//!
//! The columns of a table are the positives of all rows, then the first negative of every row that has one,
//! the second, …; a text can be several columns, but is one sequence. A column is excluded from the negatives
//! of row i when its sequence is a known positive of row i's query: one of the row's own positives, whether
//! this step uses it or not, or a positive of another row with the same query. Sequences of token ids are
//! compared, not texts, because the encoder sees no more.
//!
//! Ranks divide the tokenising: each makes a [`PartialBatch`] with the token ids of its texts, and the batch
//! is finished once the ranks have exchanged them.

use std::collections::HashMap;

use rayon::prelude::*;

use super::batch::{Batch, CsrIndices, Cursor, LossTable, RowId, Sequence};
use super::mixture::{Example, Mixture, SampledRows, TrainSet};
use super::partition::{Partition, Shard};
use super::tokenize::{Prompt, Tokenizer};
use crate::Result;
use crate::config::LossKind;

/// Settings that a batch depends on, besides its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Maximum number of tokens of a query, prompt and special tokens included.
    pub max_query_length: usize,
    /// Maximum number of tokens of a positive or negative, likewise.
    pub max_document_length: usize,
    /// Whether mean pooling includes the prompt's tokens.
    pub include_prompt: bool,
    /// Whether columns that are known positives of a row's query are excluded from its negatives.
    pub mask_known_positives: bool,
}

/// Builds batches from the rows of one mixture.
pub struct Builder<'a> {
    mixture: &'a Mixture,
    tokenizer: &'a Tokenizer,
    options: BatchOptions,
    /// For each data set, the prompts of queries and of documents.
    prompts: Vec<[Prompt; 2]>,
}

/// A text to be tokenised: a query or a document.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Text<'t> {
    text: &'t str,
    /// Index of the first data set with the same prompt for this role, so that a text with equal prompts is
    /// tokenised once.
    prompt: usize,
    role: usize,
}

const QUERY: usize = 0;
const DOCUMENT: usize = 1;

impl<'a> Builder<'a> {
    /// Prepares the prompts of all data sets.
    ///
    /// # Errors
    /// A prompt cannot be tokenised, or a length leaves no room for a text.
    pub fn new(mixture: &'a Mixture, tokenizer: &'a Tokenizer, options: BatchOptions) -> Result<Self> {
        let of_set =
            |set: &TrainSet| tokenised_prompts(tokenizer, options, [&set.query_prompt, &set.document_prompt]);
        let prompts = mixture.sets().iter().map(of_set).collect::<Result<_>>()?;
        Ok(Self { mixture, tokenizer, options, prompts })
    }

    /// Like [`Self::new`], with these prompts of queries and documents in place of those of the data sets.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn with_prompts(
        mixture: &'a Mixture,
        tokenizer: &'a Tokenizer,
        options: BatchOptions,
        prompts: [&str; 2],
    ) -> Result<Self> {
        let prompts = vec![tokenised_prompts(tokenizer, options, prompts)?; mixture.sets().len()];
        Ok(Self { mixture, tokenizer, options, prompts })
    }

    /// Tokenises all texts of the rows and lays out the tables, on one rank.
    ///
    /// # Errors
    /// A text has no tokens: its file and line.
    pub fn build(&self, rows: SampledRows) -> Result<Batch> {
        let mut partial = self.partial(rows, Shard::default())?;
        let sequences = partial.take_sequences();
        Ok(partial.finish(sequences))
    }

    /// Lays out the tables, and tokenises the texts that `shard` is to tokenise.
    ///
    /// # Errors
    /// One of these texts has no tokens: its file and line.
    pub fn partial(&self, rows: SampledRows, shard: Shard) -> Result<PartialBatch> {
        let SampledRows { examples, cursor, epoch } = rows;
        let rows: Vec<RowId> = examples.iter().map(|example| example.row).collect();
        let loss = |row: &RowId| self.mixture.sets()[row.dataset as usize].loss;
        // Each text once, in the order of the columns.
        let mut texts = UniqueTexts::default();
        let text = |row: usize, role: usize, text| {
            let set = rows[row].dataset as usize;
            let prompt = self.prompts.iter().position(|p| p[role] == self.prompts[set][role]).unwrap_or(set);
            (Text { text, prompt, role }, rows[row])
        };
        let mut tables: Vec<TextTable> = Vec::new();
        for (row, id) in rows.iter().enumerate() {
            match tables.iter_mut().find(|table| table.loss == loss(id)) {
                Some(table) => table.rows.push(row),
                None => tables.push(TextTable { loss: loss(id), rows: vec![row], ..TextTable::default() }),
            }
        }
        for table in &mut tables {
            let examples = || table.rows.iter().map(|&row| (row, &examples[row]));
            table.queries = examples().map(|(i, e)| texts.add(text(i, QUERY, &e.query))).collect();
            table.columns =
                examples().map(|(i, e)| texts.add(text(i, DOCUMENT, &e.positives[e.positive]))).collect();
            table.classes = examples().map(|(_, e)| e.class(None)).collect();
            table.scores = examples().map(|(_, e)| e.scores.clone()).collect();
            table.own = (0..table.rows.len() as u32).map(|column| vec![column]).collect();
            let deepest = examples().map(|(_, e)| e.negatives.len()).max().unwrap_or(0);
            for depth in 0..deepest {
                for (place, (i, example)) in examples().enumerate() {
                    if let Some(negative) = example.negatives.get(depth) {
                        table.own[place].push(table.columns.len() as u32);
                        table.columns.push(texts.add(text(i, DOCUMENT, negative)));
                        table.classes.push(example.class(Some(depth)));
                    }
                }
            }
        }
        // The positives of a row that this step does not use are compared with, but not part of the batch.
        let inside = texts.list.len();
        for table in tables.iter_mut().filter(|_| self.options.mask_known_positives) {
            table.known = table
                .rows
                .iter()
                .map(|&i| {
                    examples[i].positives.iter().map(|known| texts.add(text(i, DOCUMENT, known))).collect()
                })
                .collect();
        }

        let lengths: Vec<usize> = texts.list.iter().map(|(text, _)| text.text.len()).collect();
        let partition = Partition::balance(&lengths, shard.ranks);
        let local: Vec<_> = partition.of(shard.rank).iter().map(|&text| texts.list[text]).collect();
        let sequences = self.tokenise(&local)?;
        Ok(PartialBatch { sequences, partition, inside, tables, rows, cursor, epoch })
    }

    fn tokenise(&self, texts: &[(Text<'_>, RowId)]) -> Result<Vec<Sequence>> {
        let lengths = [self.options.max_query_length, self.options.max_document_length];
        texts
            .par_iter()
            .with_min_len(8)
            .map(|(text, row)| {
                let prompt = &self.prompts[text.prompt][text.role];
                self.tokenizer
                    .encode_one(text.text, prompt, lengths[text.role])
                    .map_err(|error| self.mixture.error(*row, error.to_string()))
            })
            .collect()
    }
}

/// The prompts of queries and of documents, tokenised.
fn tokenised_prompts(
    tokenizer: &Tokenizer,
    options: BatchOptions,
    [query, document]: [&str; 2],
) -> Result<[Prompt; 2]> {
    let prompt = |text: &str, length| tokenizer.prompt(text, length, options.include_prompt);
    Ok([prompt(query, options.max_query_length)?, prompt(document, options.max_document_length)?])
}

/// A batch of which this rank has tokenised its texts.
#[derive(Debug)]
pub struct PartialBatch {
    sequences: Vec<Sequence>, // of this rank's texts, in the order of `partition`
    partition: Partition,
    inside: usize, // number of leading texts that are part of the batch; the others are only compared with
    tables: Vec<TextTable>,
    rows: Vec<RowId>,
    cursor: Cursor,
    epoch: f64,
}

/// A [`LossTable`] that refers to texts by their index in the list of unique texts. These become indices of
/// sequences once all texts are tokenised.
#[derive(Debug, Default)]
struct TextTable {
    loss: LossKind,
    rows: Vec<usize>,
    queries: Vec<usize>,
    columns: Vec<usize>,
    /// Class of each column.
    classes: Vec<Option<Class>>,
    /// Columns of each row's own positive and negatives.
    own: Vec<Vec<u32>>,
    /// Known positives of each row; empty if nothing is masked.
    known: Vec<Vec<usize>>,
    /// Scores of each row's own columns; empty lists if the loss does not use scores.
    scores: Vec<Vec<f32>>,
}

/// A class: data set and number of the class there.
type Class = (u32, u32);

impl Example {
    /// The class of the row and its positive, or of a negative.
    fn class(&self, negative: Option<usize>) -> Option<Class> {
        let classes = self.classes.as_ref()?;
        Some((self.row.dataset, negative.map_or(classes.own, |depth| classes.negatives[depth])))
    }
}

impl PartialBatch {
    /// Which rank tokenises which texts.
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// Takes the sequences of this rank's texts, in the order of [`Self::partition`].
    pub fn take_sequences(&mut self) -> Vec<Sequence> {
        std::mem::take(&mut self.sequences)
    }

    /// Finishes the batch, given the sequences of all texts in their order.
    pub fn finish(self, sequences: Vec<Sequence>) -> Batch {
        let Self { inside, tables, rows, cursor, epoch, .. } = self;
        // Texts that have the same tokens become one sequence.
        let mut unique = UniqueSequences::default();
        let mut numbers = Vec::with_capacity(sequences.len());
        for (i, sequence) in sequences.into_iter().enumerate() {
            numbers.push(if i < inside { Some(unique.add(sequence)) } else { unique.find(&sequence) });
        }
        let tables = tables.into_iter().map(|table| table.finish(&numbers)).collect();
        Batch { sequences: unique.list, tables, rows, cursor, epoch }
    }
}

impl TextTable {
    /// `numbers` is the sequence of each text, if that is part of the batch.
    fn finish(self, numbers: &[Option<u32>]) -> LossTable {
        let Self { loss, rows, queries, columns, classes, mut own, known, mut scores } = self;
        let number = |text: &usize| numbers[*text].unwrap_or_default();
        let queries: Vec<u32> = queries.iter().map(number).collect();
        let candidates: Vec<u32> = columns.iter().map(number).collect();
        let mut known: Vec<Vec<u32>> =
            known.iter().map(|texts| texts.iter().filter_map(|text| numbers[*text]).collect()).collect();
        // Every text of a labelled row's class is a positive of the row.
        let mut of_class: HashMap<Class, Vec<u32>> = HashMap::new();
        for (column, class) in classes.iter().enumerate() {
            if let Some(class) = class {
                of_class.entry(*class).or_default().push(candidates[column]);
            }
        }
        for (known, class) in known.iter_mut().zip(&classes) {
            known.extend(class.iter().filter_map(|class| of_class.get(class)).flatten());
        }

        let excluded = match known.is_empty() {
            true => vec![Vec::new(); rows.len()],
            false => excluded(&queries, &candidates, &known),
        };
        // Without in-batch negatives a row's own columns are its candidates, so the excluded ones are removed
        // here, too.
        for ((own, excluded), scores) in own.iter_mut().zip(&excluded).zip(&mut scores) {
            let keep: Vec<bool> = own.iter().map(|column| excluded.binary_search(column).is_err()).collect();
            let (mut of_column, mut of_score) = (keep.iter(), keep.iter());
            own.retain(|_| of_column.next() == Some(&true));
            scores.retain(|_| of_score.next() == Some(&true));
        }
        let positives = (0..rows.len() as u32).collect();
        LossTable {
            loss,
            rows: rows.into_iter().map(|row| row as u32).collect(),
            queries,
            candidates,
            positives,
            excluded: csr(&excluded),
            own: csr(&own),
            scores: scores.concat(),
        }
    }
}

/// Distinct texts in the order in which they first occur, each with a row that has it.
#[derive(Default)]
struct UniqueTexts<'t> {
    list: Vec<(Text<'t>, RowId)>,
    numbers: HashMap<Text<'t>, usize>,
}

impl<'t> UniqueTexts<'t> {
    fn add(&mut self, (text, row): (Text<'t>, RowId)) -> usize {
        *self.numbers.entry(text).or_insert_with(|| {
            self.list.push((text, row));
            self.list.len() - 1
        })
    }
}

/// Distinct sequences in the order in which they first occur.
#[derive(Default)]
struct UniqueSequences {
    list: Vec<Sequence>,
    numbers: HashMap<Sequence, u32>,
}

impl UniqueSequences {
    fn add(&mut self, sequence: Sequence) -> u32 {
        if let Some(number) = self.find(&sequence) {
            return number;
        }
        let number = self.list.len() as u32;
        self.list.push(sequence.clone());
        self.numbers.insert(sequence, number);
        number
    }

    fn find(&self, sequence: &Sequence) -> Option<u32> {
        self.numbers.get(sequence).copied()
    }
}

/// The columns that each row excludes, ascending: those whose sequence is a known positive of its query,
/// except column `row`, the row's own positive. `known` is the known positives of each row.
fn excluded(queries: &[u32], candidates: &[u32], known: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut of_query: HashMap<u32, Vec<u32>> = HashMap::new();
    for (query, known) in queries.iter().zip(known) {
        of_query.entry(*query).or_default().extend(known);
    }
    let mut columns_of: HashMap<u32, Vec<u32>> = HashMap::new();
    for (column, sequence) in candidates.iter().enumerate() {
        columns_of.entry(*sequence).or_default().push(column as u32);
    }
    let columns = |row: usize, query: &u32| {
        let mut sequences = of_query.get(query).cloned().unwrap_or_default();
        sequences.sort_unstable();
        sequences.dedup();
        let mut columns: Vec<u32> =
            sequences.iter().filter_map(|sequence| columns_of.get(sequence)).flatten().copied().collect();
        columns.retain(|column| *column != row as u32);
        columns.sort_unstable();
        columns
    };
    queries.iter().enumerate().map(|(row, query)| columns(row, query)).collect()
}

fn csr(rows: &[Vec<u32>]) -> CsrIndices {
    let mut csr = CsrIndices { offsets: vec![0], columns: Vec::new() };
    for row in rows {
        csr.columns.extend(row);
        csr.offsets.push(csr.columns.len() as u32);
    }
    csr
}

#[cfg(test)]
mod tests;
