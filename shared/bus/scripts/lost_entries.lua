-- Find requests that nobody will go on with: their work entry is gone, and no stage has ended it. Whoever deletes a work
-- stream, or entries of it, leaves such. An entry that was delivered is there as long as it is pending. Of a request
-- that a replica of an old build has claimed or moved since, nobody can tell.
-- KEYS: record...
-- ARGV: none
-- Returns the places, from 1, of these requests.
-- requires: typed
-- requires: note_entry
local streams, lost = {}, {}

local function number(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return {tonumber(ms), tonumber(seq)}
end

local function before(a, b)
  return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2])
end

local function look(stream)
  if not is_a('stream', stream) then return {} end
  local first, group = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1], {}
  for _, fields in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  end
  local delivered = number(group['last-delivered-id'] or '0-0')
  return {first = first and number(first[1]), group = group['name'], delivered = delivered}
end

local function is_gone(stream, id)
  local found, at = streams[stream] or look(stream), number(id)
  streams[stream] = found
  if not found.first or before(at, found.first) then return true end
  if not found.group or before(found.delivered, at) then return false end
  return #redis.call('XPENDING', stream, found.group, id, id, 1) == 0
end

for i, record in ipairs(KEYS) do
  if is_a('hash', record) then
    local entry, over, finish = unpack(redis.call('HMGET', record, 'entry', 'over', 'finish'))
    local stream, id, noted = string.match(entry or '', '^(.*) (%d+-%d+) (%S+)$')
    if id and not over and not finish and noted == progress(record) and is_gone(stream, id) then
      lost[#lost + 1] = i
    end
  end
end
return lost
