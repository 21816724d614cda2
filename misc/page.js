"use strict";
// Shared by all pages: the data from write_page and small helpers.

const ARRAYS = {
  float32: Float32Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, int16: Int16Array,
};

/** Decode an array that misc.page.packed wrote. */
function unpack({ dtype, data }) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[dtype](bytes.buffer);
}

/** Create an element with a name, properties and children (elements or text). */
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);
const DATA = JSON.parse(byId("data").textContent);
