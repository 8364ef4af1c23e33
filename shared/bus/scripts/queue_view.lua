-- Read the figures of a work stream.
-- KEYS: stream
-- ARGV: consumer group
-- Returns {length, oldest entry, pending, oldest entry that was never delivered, entries ever added}.
-- requires: consumer_group
local function first(from)
  local entry = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 1)[1]
  return entry and entry[1] or ''
end
local found = consumer_group() or {pending = 0, ['last-delivered-id'] = '0-0'}
local stream = redis.pcall('XINFO', 'STREAM', KEYS[1])
local added = 0
for i = 1, #stream, 2 do
  if stream[i] == 'entries-added' then added = stream[i + 1] end
end
local waiting = first('(' .. found['last-delivered-id'])
return {redis.call('XLEN', KEYS[1]), first('-'), found['pending'], waiting, added}
