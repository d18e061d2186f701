//! Rows to a batch: every text tokenised once, and the table by which the loss finds its embedding.
//!
//! Columns are the positives of all rows, then the first negative of every row that has one, the second, …: the same
//! text may be several columns, but it is one sequence. A column is left out of row i's negatives when its sequence is a
//! known positive of row i's query: one of the row's own positives, also those that this step does not use, or a positive
//! of another row with the same query. Sequences are compared, not texts: what the encoder cannot tell apart is equal.
//!
//! Ranks share the tokenising: each makes a draft with the tokens of its texts, and the batch is finished once they are put
//! together.

use std::collections::HashMap;

use rayon::prelude::*;

use super::batch::{Batch, Cursor, Lists, RowId, Sequence, Table};
use super::mixture::{Example, Mixture, Picked, Set};
use super::share::Share;
use super::tokenize::{Prompt, Tokenizer};
use crate::Result;
use crate::config::LossKind;

/// What a batch depends on besides its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Tokens of a query at most, the prompt and special tokens included.
    pub max_query_length: usize,
    /// Tokens of a positive or negative at most.
    pub max_document_length: usize,
    /// Whether mean pooling counts the prompt's tokens.
    pub include_prompt: bool,
    /// Whether columns known to answer a row's query are left out of its negatives.
    pub mask_known_positives: bool,
}

/// Builds batches from the rows of one mixture.
pub struct Builder<'a> {
    mixture: &'a Mixture,
    tokenizer: &'a Tokenizer,
    options: Options,
    /// Of each data set: for queries, for documents.
    prompts: Vec<[Prompt; 2]>,
}

/// A text to be tokenised: a query or a document of a data set.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Text<'t> {
    text: &'t str,
    /// Data sets with the same prompts count as one.
    prompt: usize,
    role: usize,
}

const QUERY: usize = 0;
const DOCUMENT: usize = 1;

impl<'a> Builder<'a> {
    /// # Errors
    /// A prompt cannot be tokenised, or a length leaves no room for a text.
    pub fn new(mixture: &'a Mixture, tokenizer: &'a Tokenizer, options: Options) -> Result<Self> {
        let of_set = |set: &Set| tokenized(tokenizer, options, [&set.query_prompt, &set.document_prompt]);
        let prompts = mixture.sets().iter().map(of_set).collect::<Result<_>>()?;
        Ok(Self { mixture, tokenizer, options, prompts })
    }

    /// As [`Self::new`], with these prompts for queries and documents in place of those of the data sets.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_prompts(
        mixture: &'a Mixture,
        tokenizer: &'a Tokenizer,
        options: Options,
        prompts: [&str; 2],
    ) -> Result<Self> {
        let prompts = vec![tokenized(tokenizer, options, prompts)?; mixture.sets().len()];
        Ok(Self { mixture, tokenizer, options, prompts })
    }

    /// Tokenises the rows and lays out the table.
    ///
    /// # Errors
    /// A text has no tokens: its file and line.
    pub fn build(&self, picked: Picked) -> Result<Batch> {
        let mut draft = self.draft(picked, Part::default())?;
        let sequences = draft.take();
        Ok(draft.finish(sequences))
    }

    /// Lays out the columns, and tokenises this rank's share of the texts.
    ///
    /// # Errors
    /// A text of the share has no tokens: its file and line.
    pub fn draft(&self, picked: Picked, part: Part) -> Result<Draft> {
        let Picked { examples, cursor, epoch } = picked;
        let rows: Vec<RowId> = examples.iter().map(|example| example.row).collect();
        let loss = |row: &RowId| self.mixture.sets()[row.dataset as usize].loss;
        // Every text once, in the order of the columns.
        let mut texts = Texts::default();
        let text = |row: usize, role: usize, text| {
            let set = rows[row].dataset as usize;
            let prompt = self.prompts.iter().position(|p| p[role] == self.prompts[set][role]).unwrap_or(set);
            (Text { text, prompt, role }, rows[row])
        };
        let mut tables: Vec<Columns> = Vec::new();
        for (row, id) in rows.iter().enumerate() {
            match tables.iter_mut().find(|table| table.loss == loss(id)) {
                Some(table) => table.rows.push(row),
                None => tables.push(Columns { loss: loss(id), rows: vec![row], ..Columns::default() }),
            }
        }
        for table in &mut tables {
            let examples = || table.rows.iter().map(|&row| (row, &examples[row]));
            table.queries = examples().map(|(i, e)| texts.add(text(i, QUERY, &e.query))).collect();
            table.columns =
                examples().map(|(i, e)| texts.add(text(i, DOCUMENT, &e.known[e.positive]))).collect();
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
        // Other positives of a row are only compared with; they are not part of the batch.
        let inside = texts.list.len();
        for table in tables.iter_mut().filter(|_| self.options.mask_known_positives) {
            table.known = table
                .rows
                .iter()
                .map(|&i| examples[i].known.iter().map(|known| texts.add(text(i, DOCUMENT, known))).collect())
                .collect();
        }

        let lengths: Vec<usize> = texts.list.iter().map(|(text, _)| text.text.len()).collect();
        let share = Share::deal(&lengths, part.ranks);
        let local: Vec<_> = share.of(part.rank).iter().map(|&text| texts.list[text]).collect();
        let sequences = self.tokenise(&local)?;
        Ok(Draft { sequences, share, inside, tables, rows, cursor, epoch })
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

/// The tokens of a query's and a document's prompt.
fn tokenized(tokenizer: &Tokenizer, options: Options, [query, document]: [&str; 2]) -> Result<[Prompt; 2]> {
    let prompt = |text: &str, length| tokenizer.prompt(text, length, options.include_prompt);
    Ok([prompt(query, options.max_query_length)?, prompt(document, options.max_document_length)?])
}

/// A rank among others, as one that shares their work without talking to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

/// All of the work.
impl Default for Part {
    fn default() -> Self {
        Self { rank: 0, ranks: 1 }
    }
}

/// A batch of whose texts this rank has tokenised its share.
#[derive(Debug)]
pub struct Draft {
    sequences: Vec<Sequence>, // of this rank's texts
    share: Share,
    inside: usize, // the first so many texts are part of the batch, the others are only compared with
    tables: Vec<Columns>,
    rows: Vec<RowId>,
    cursor: Cursor,
    epoch: f64,
}

/// A table of texts, by their numbers, before it is one of sequences.
#[derive(Debug, Default)]
struct Columns {
    loss: LossKind,
    rows: Vec<usize>,
    queries: Vec<usize>,
    columns: Vec<usize>,
    /// Of each column.
    classes: Vec<Option<Class>>,
    own: Vec<Vec<u32>>,
    /// Of each row; without any rows where nothing is masked.
    known: Vec<Vec<usize>>,
    /// Of each row: what its own columns have, or nothing.
    scores: Vec<Vec<f32>>,
}

/// A class of a labelled data set.
type Class = (u32, u32);

impl Example {
    /// The class of the row and its positive, or of a negative.
    fn class(&self, negative: Option<usize>) -> Option<Class> {
        let classes = self.classes.as_ref()?;
        Some((self.row.dataset, negative.map_or(classes.own, |depth| classes.negatives[depth])))
    }
}

impl Draft {
    /// Which texts each rank has tokenised.
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// This rank's texts, in the order of its share; they are no longer part of the draft.
    pub fn take(&mut self) -> Vec<Sequence> {
        std::mem::take(&mut self.sequences)
    }

    /// The batch, from the tokens of all texts.
    pub fn finish(self, sequences: Vec<Sequence>) -> Batch {
        let Self { inside, tables, rows, cursor, epoch, .. } = self;
        // Texts that have the same tokens become one sequence.
        let mut unique = Sequences::default();
        let mut numbers = Vec::with_capacity(sequences.len());
        for (i, sequence) in sequences.into_iter().enumerate() {
            numbers.push(if i < inside { Some(unique.add(sequence)) } else { unique.find(&sequence) });
        }
        let tables = tables.into_iter().map(|table| table.finish(&numbers)).collect();
        Batch { sequences: unique.list, tables, rows, cursor, epoch }
    }
}

impl Columns {
    /// `numbers`: the sequence of each text, if it is part of the batch.
    fn finish(self, numbers: &[Option<u32>]) -> Table {
        let Self { loss, rows, queries, columns, classes, mut own, known, mut scores } = self;
        let number = |text: &usize| numbers[*text].unwrap_or_default();
        let queries: Vec<u32> = queries.iter().map(number).collect();
        let candidates: Vec<u32> = columns.iter().map(number).collect();
        let mut known: Vec<Vec<u32>> =
            known.iter().map(|texts| texts.iter().filter_map(|text| numbers[*text]).collect()).collect();
        // Whatever is of a labelled row's class answers it.
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
        // Without in-batch negatives these are all candidates, so what is masked is left out here too.
        for ((own, excluded), scores) in own.iter_mut().zip(&excluded).zip(&mut scores) {
            let keep: Vec<bool> = own.iter().map(|column| excluded.binary_search(column).is_err()).collect();
            let (mut of_column, mut of_score) = (keep.iter(), keep.iter());
            own.retain(|_| of_column.next() == Some(&true));
            scores.retain(|_| of_score.next() == Some(&true));
        }
        let positives = (0..rows.len() as u32).collect();
        Table {
            loss,
            rows: rows.into_iter().map(|row| row as u32).collect(),
            queries,
            candidates,
            positives,
            excluded: lists(&excluded),
            own: lists(&own),
            scores: scores.concat(),
        }
    }
}

/// Texts in the order they were first met, each with a row it stands in.
#[derive(Default)]
struct Texts<'t> {
    list: Vec<(Text<'t>, RowId)>,
    numbers: HashMap<Text<'t>, usize>,
}

impl<'t> Texts<'t> {
    fn add(&mut self, (text, row): (Text<'t>, RowId)) -> usize {
        *self.numbers.entry(text).or_insert_with(|| {
            self.list.push((text, row));
            self.list.len() - 1
        })
    }
}

/// Sequences in the order they were first met.
#[derive(Default)]
struct Sequences {
    list: Vec<Sequence>,
    numbers: HashMap<Sequence, u32>,
}

impl Sequences {
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

/// The columns that each row leaves out, ascending: those whose sequence is a known positive of its query. The row's own
/// positive is column `row`. `known` is empty where nothing is masked.
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

fn lists(rows: &[Vec<u32>]) -> Lists {
    let mut lists = Lists { offsets: vec![0], columns: Vec::new() };
    for row in rows {
        lists.columns.extend(row);
        lists.offsets.push(lists.columns.len() as u32);
    }
    lists
}

#[cfg(test)]
mod tests;
