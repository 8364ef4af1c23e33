-- Prelude: a record notes where its request's work entry is, and `progress` of the request at that time: its epoch, and
-- whether it is encoded. Every build changes one of these when it claims or moves an entry, but old ones note nothing.
local function progress(record)
  local encoded = redis.call('HEXISTS', record, 'encode') == 1
  return (redis.call('HGET', record, 'epoch') or '0') .. (encoded and '+encoded' or '')
end

local function note_entry(record, stream, id)
  redis.call('HSET', record, 'entry', stream .. ' ' .. id .. ' ' .. progress(record))
end
