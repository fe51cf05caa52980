// Elements, numbers and token text. Text only ever enters the page as text nodes and attributes.

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const percent = (share) => `${(100 * share).toFixed(3)}%`;

const superscript = (exponent) =>
  String(exponent).replace(/[-\d]/g, (digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]));

const thousands = (count) => count.toLocaleString("en-GB");

function number(value, digits = 3) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${mantissa} × 10${superscript(Number(exponent))}`.replace(/^-/, "−");
  }
  if (size >= 1e4) return thousands(Math.round(value)).replace(/^-/, "−");
  return String(Number(value.toPrecision(digits))).replace(/^-/, "−");
}

function densityText(density) {
  if (density === 0) return "never fired";
  return `${number(100 * density, 2)} % of tokens, 1 in ${thousands(Number((1 / density).toPrecision(2)))}`;
}

const CONTROL = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const NAMED = { "\n": "↵", "\r": "␍", "\t": "⇥" };

const codeOf = (character) => character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");

// Characters without a shape get one: newlines and tabs a sign, other controls (those that turn the direction of
// the text too) their code.
const shaped = (text) => text.replace(CONTROL, (character) => NAMED[character] ?? `⟨${codeOf(character)}⟩`);

// Spaces too are marked where they would be lost: alone, doubled, or at the end.
const visible = (token) => shaped(token.replace(/^ +$| {2,}| +$/g, (spaces) => "·".repeat(spaces.length)));

// A token on its own: its leading space counts too.
const alone = (token) => (token === "" ? "∅" : visible(token.replace(/^ +/, (spaces) => "·".repeat(spaces.length))));
